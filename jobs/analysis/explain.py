"""Tells the life of one row."""

from collections.abc import Iterator, Mapping, Sequence

from jobs.analysis.answers import answers_of_row, failures
from jobs.analysis.arguments import whole_number
from jobs.analysis.program import EXIT_DONE, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.row_laws import ANSWERED
from jobs.analysis.row_life import SequenceLife, lives_of_row
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
    unrecorded = list(_unrecorded_answers(run, row, lives))
    show(unrecorded)
    if not lives and not failed and not unrecorded:
        run.require_records()
        raise UsageError(f"row={row}: no request of {run.path} has it, and it has not failed; {_known_rows(run)}")
    return EXIT_DONE


def _unrecorded_answers(run: RecordedRun, row: int, lives: Sequence[SequenceLife]) -> Iterator[str]:
    """What is known of the row's answers that only an attempt without records can have given."""
    numbers = [attempt.number for attempt in run.attempts if not attempt.is_recorded]
    if not numbers:
        return
    told = {life.request["sample"] for life in lives if life.request["finish_reason"] in ANSWERED}
    attempts = f"attempt {' or '.join(map(str, numbers))}"
    for answer in answers_of_row(run.path, row):
        if answer["sample"] not in told:
            yield (
                f"row {row} ({answer['id']}), sample {answer['sample']}: answered in {attempts}, which was not "
                f"recorded (recorder=off); all that is known: {answer['num_prompt_tokens']:,} tokens in, "
                f"{answer['num_output_tokens']:,} out, ended by {answer['finish_reason']}"
            )


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
