"""Explains a run: where its time went, what it was like, and what could be better."""

from collections.abc import Mapping

from jobs.analysis.program import EXIT_DONE, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.run_paths import find_runs


def _run(values: Mapping[str, str]) -> int:
    runs = [RecordedRun(path) for path in find_runs("run", values["run"])]
    for run in runs:
        run.require_records()
    if "sql" in values:
        from jobs.analysis.views import connect, query

        with connect(runs) as connection:
            print(query(connection, values["sql"]), end="")
        return EXIT_DONE
    figures = [RunFigures.of(run) for run in runs]
    print(_screen(figures))
    return EXIT_DONE


def _screen(figures: list[RunFigures]) -> str:
    if len(figures) == 1:
        from jobs.analysis.screen import screen

        return screen(figures[0])
    from jobs.analysis.sweep_screen import sweep_screen

    return sweep_screen(figures)


ANALYSIS = Analysis(
    about="Explains where the time of a run went and writes report.html into its directory; compares a sweep's runs.",
    keys={
        "run": "a run directory, the directory of a sweep, or a glob of these",
        "sql": "a query over the views steps, block_events, requests, generations and runs; it is answered instead",
    },
    required=["run"],
    run=_run,
)
