"""Tells the life of one row."""

from collections.abc import Mapping

from jobs.analysis.answers import failures
from jobs.analysis.arguments import whole_number
from jobs.analysis.program import EXIT_DONE, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.row_life import lives_of_row
from jobs.analysis.run_paths import find_run
from jobs.analysis.terminal import show
from jobs.usage import UsageError


def _run(values: Mapping[str, str]) -> int:
    row = whole_number("row", values["row"])
    run = RecordedRun(find_run("run", values["run"]))
    lives = lives_of_row(run, row)
    failed = [failure for failure in failures(run.path) if failure["row"] == row]
    for failure in failed:
        where = f"{failure['file']}, line {failure['line']}"
        show([f"row {row} failed: {failure['code']}: {failure['reason']} ({where})"])
    for life in lives:
        show(life.lines())
    if not lives and not failed:
        run.require_records()
        raise UsageError(f"row={row}: no request of {run.path} has it, and it has not failed; {_known_rows(run)}")
    return EXIT_DONE


def _known_rows(run: RecordedRun) -> str:
    rows = run.requests["row"].to_pylist()
    if not rows:
        return "no request has ended"
    note = f"; {run.note_on_unrecorded}" if run.note_on_unrecorded else ""
    return f"its records have {len(set(rows)):,} rows, {min(rows)} to {max(rows)}{note}"


ANALYSIS = Analysis(
    about="Tells the life of one row: queue, chunks, blocks found and from whom, preemptions, tail.",
    keys={"run": "a run directory", "row": "the number of an input row, from 0"},
    required=["run", "row"],
    run=_run,
)
