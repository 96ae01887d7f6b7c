"""Compares two runs."""

from collections.abc import Mapping

from jobs.analysis.comparison import Comparison
from jobs.analysis.program import EXIT_DONE, EXIT_FOUND, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_paths import find_run
from jobs.analysis.terminal import show


def _run(values: Mapping[str, str]) -> int:
    a, b = (RecordedRun(find_run(key, values[key])) for key in ("a", "b"))
    for run in (a, b):
        run.require_records()
    comparison = Comparison(a, b)
    show(comparison.lines())
    return EXIT_DONE if comparison.same else EXIT_FOUND


ANALYSIS = Analysis(
    about="Compares two runs: configuration, schedule step by step, tokens row by row, figures. Exit code 1 where "
    "schedules or tokens differ.",
    keys={"a": "a run directory", "b": "the run directory to compare it with"},
    required=["a", "b"],
    run=_run,
)
