"""Explains a run: where its time went, what it was like, and what could be better."""

from collections.abc import Mapping
from pathlib import Path

from jobs.analysis.program import EXIT_DONE, Analysis
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.run_paths import open_runs
from jobs.analysis.terminal import show

REPORT = "report.html"


def _run(values: Mapping[str, str]) -> int:
    runs = open_runs("run", values["run"])
    if "sql" in values:
        from jobs.analysis.views import connect, query

        with connect(runs, values["sql"]) as connection:
            show(query(connection, values["sql"]).splitlines())
        return EXIT_DONE
    figures = [RunFigures.of(run) for run in runs]
    if len(figures) == 1:
        _one(figures[0])
    else:
        _several(figures, Path(values["run"]))
    return EXIT_DONE


def _one(figures: RunFigures) -> None:
    from jobs.analysis.report_data import run_data
    from jobs.analysis.screen import screen

    show(screen(figures))
    _write_report(figures.run.path, run_data(figures))


def _several(figures: list[RunFigures], sweep: Path) -> None:
    from jobs.analysis.report_data import sweep_data
    from jobs.analysis.sweep_screen import sweep_screen

    show(sweep_screen(figures))
    if sweep.is_dir():  # what a glob finds has no place of its own
        _write_report(sweep, sweep_data(sweep.name, figures))


def _write_report(directory: Path, data: dict[str, object]) -> None:
    from jobs.analysis.output_file import write_output
    from jobs.analysis.report_page import page

    path = write_output(directory / REPORT, page(data))
    show(["", f"{path}  {path.stat().st_size / 1e6:.1f} MB"])


ANALYSIS = Analysis(
    about=f"Explains where the time of a run went and writes {REPORT} into its directory; compares a sweep's runs.",
    keys={
        "run": "a run directory, the directory of a sweep, or a glob of these",
        "sql": "a query over the views steps, block_events, requests, generations and runs; it is answered instead",
    },
    required=["run"],
    run=_run,
)
