"""What jobs.analyze says of several runs: what differs between their configurations, against their figures."""

from collections.abc import Iterator, Sequence

from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.time_ledger import PLACES, UNRECORDED
from jobs.analysis.views import flat_config

COLUMNS = {
    "wall_s": "wall s",
    "steps_s": "steps s",
    "tokens_per_s": "tok/s",
    "num_steps": "steps",
    "mean_batch": "batch",
    "mean_kv_use": "KV use",
    "prefix_hit_rate": "hits",
    "preemptions": "preempted",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "TTFT p99 ms",
    "token_p50_ms": "ms/token",
}
SHARES = ("mean_kv_use", "prefix_hit_rate")


def config_deltas(runs: Sequence[RecordedRun]) -> dict[str, list[object]]:
    """Keys whose values are not the same in all runs, and each run's value; None where a run has no such key."""
    configs = [flat_config(run) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    found = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def sweep_screen(all_figures: Sequence[RunFigures]) -> Iterator[str]:
    runs = [figures.run for figures in all_figures]
    deltas = config_deltas(runs)
    facts = [figures.facts() for figures in all_figures]
    yield f"{len(runs)} runs; what differs between them: {', '.join(deltas) or 'nothing in the configuration'}"
    yield ""
    header = ["", *deltas, *COLUMNS.values(), "status"]
    rows = [
        [str(number), *(shown_value(deltas[key][number - 1]) for key in deltas)]
        + [_number(name, facts[number - 1][name]) for name in COLUMNS]
        + [runs[number - 1].status]
        for number in range(1, len(runs) + 1)
    ]
    yield from _aligned([header, *rows])
    yield ""
    places = [place for place in PLACES if place != UNRECORDED or any(f.ledger[place] for f in all_figures)]
    shares = [["", *places]]
    for number, figures in enumerate(all_figures, start=1):
        wall = sum(figures.ledger.values()) or 1.0
        shares.append([str(number), *(f"{figures.ledger[place] / wall:.1%}" for place in places)])
    yield "share of the wall time"
    yield from _aligned(shares)
    yield ""
    for number, run in enumerate(runs, start=1):
        yield f"{number}  {run.path}"


def shown_value(value: object) -> str:
    """As it is written on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(name: str, value: float) -> str:
    if value != value:
        return "-"
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
