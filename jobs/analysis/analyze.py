"""Explains a run: where its time went, what it was like, and what could be better."""

from collections.abc import Mapping

from jobs.analysis.program import EXIT_DONE, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.run_paths import find_runs
from jobs.analysis.screen import screen


def _run(values: Mapping[str, str]) -> int:
    runs = [RecordedRun(path) for path in find_runs("run", values["run"])]
    for run in runs:
        run.require_records()
    for run in runs:
        print(screen(RunFigures.of(run)))
    return EXIT_DONE


ANALYSIS = Analysis(
    about="Explains where the time of a run went and writes report.html beside its manifest.",
    keys={"run": "a run directory, the directory of a sweep, or a glob of these"},
    required=["run"],
    run=_run,
)
