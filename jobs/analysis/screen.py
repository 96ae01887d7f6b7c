"""What jobs.analyze says of one run on one screen."""

from collections.abc import Iterator

import numpy as np

from jobs.analysis.findings import Findings, unfinished
from jobs.analysis.latencies import seconds, slow_rows
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.text_plot import bar, over_time, rate_over_time, spark
from jobs.analysis.time_ledger import UNRECORDED

PLOT_WIDTH = 60
NUM_SLOW_ROWS = 3


def screen(figures: RunFigures) -> Iterator[str]:
    """About 45 lines of up to 120 characters."""
    run = figures.run
    model = (run.manifest.get("model") or {}).get("path") or (run.manifest.get("config") or {}).get("model", {}).get(
        "path"
    )
    counts = run.manifest.get("counts") or {}
    yield f"{run.path}  {model or 'model unknown'} on {run.manifest.get('device', 'unknown device')}, {run.status}"
    note = unfinished(figures)
    if note:
        yield f"  {note}"
    answered = (
        f"{counts['answered']:,} rows answered, {counts['failed']:,} failed" if counts else "rows not counted yet"
    )
    yield (
        f"  {answered}; {figures.num_prompt_tokens:,} tokens in, {figures.num_sampled_tokens:,} out; "
        f"{figures.num_steps:,} steps; {figures.tokens_per_s:,.1f} output tok/s over {figures.steps_s:,.2f} s"
    )
    yield ""
    yield from _ledger(figures)
    if not figures.num_steps:
        yield "no step was recorded"
        return
    yield ""
    yield from _plots(figures)
    yield ""
    yield from _cache(figures)
    yield from _latencies(figures)
    yield "slowest rows"
    for slow in slow_rows(run, figures.latencies, NUM_SLOW_ROWS):
        took = f"{seconds(slow.taken_ms)}, queued {seconds(slow.queued_ms)}"
        yield f"  row {slow.row} ({slow.id[:24]})  {took}: {slow.reason}"
    findings = Findings(figures).top()
    yield "findings" if findings else "findings: none; nothing stands out"
    for number, finding in enumerate(findings, start=1):
        yield f"  {number}. {finding.text}"
        yield f"     {finding.evidence}"


def _ledger(figures: RunFigures) -> Iterator[str]:
    wall = sum(figures.ledger.values())
    yield f"wall time {figures.wall_s:,.2f} s"
    for place, meaning in figures.meanings.items():
        amount = figures.ledger[place]
        if place == UNRECORDED and not amount:  # as nearly always
            continue
        share = amount / wall if wall else 0.0
        yield f"  {place:10s} {amount / 1e9:9.3f} s {share:6.1%}  {bar(share, 16):16s}  {meaning}"
    yield f"  {'sum':10s} {wall / 1e9:9.3f} s {1 if wall else 0:6.1%}"


def _plots(figures: RunFigures) -> Iterator[str]:
    column = figures.run.step_column
    start, end = figures.step_spans
    whole = (int(start.min()), int(end.max()))
    order = np.argsort(end, kind="stable")
    ends = end[order]
    # A step has its values since the step before it ended; replicas and attempts stand one after the other in time.
    starts = np.maximum(start[order], np.concatenate([[whole[0]], ends[:-1]]))
    left_out = f", without the {figures.paused_s:,.1f} s between attempts" if figures.paused_s else ""
    yield f"over time, from {whole[0] / 1e9:.1f} to {whole[1] / 1e9:.1f} s{left_out}"
    sampled = np.bincount(figures.run.step_sequences.step_row, figures.run.step_sequences.sampled, figures.num_steps)
    rate = rate_over_time(end, sampled, PLOT_WIDTH, whole=whole)
    yield f"  output tok/s  {spark(rate, rate.max())}  up to {rate.max():,.0f}"
    for name, title, top in (
        ("batch_size", "batch size", None),
        ("num_waiting", "rows waiting", None),
        ("used_blocks", "KV in use", figures.run.num_blocks),
        ("cached_blocks", "KV cached", figures.run.num_blocks),
    ):
        values = column(name)[order]
        line = spark(over_time(starts, ends, values, PLOT_WIDTH, whole=whole), top or float(values.max()))
        largest = f"{values.max():,} of {top:,} blocks" if top else f"{values.max():,}"
        yield f"  {title:13s} {line}  up to {largest}, {figures.mean_over_time(name):,.1f} on average"


def _cache(figures: RunFigures) -> Iterator[str]:
    yield (f"prefix cache  {figures.hit_rate:.1%} of the prompt tokens; {figures.tokens_saved:,} tokens saved in all")
    dropped = (
        f"; {figures.num_dropped_tokens:,} tokens sampled in vain (look-ahead)" if figures.num_dropped_tokens else ""
    )
    yield (
        f"preemptions   {figures.num_preemptions:,}; {figures.num_recomputed_tokens:,} tokens computed again{dropped}"
    )


def _latencies(figures: RunFigures) -> Iterator[str]:
    def line(name: str) -> str:
        return " / ".join(_milliseconds(figures.percentile(name, q)) for q in (50, 90, 99))

    yield (
        f"latency p50/p90/p99  queue {line('queued')};  first token {line('to_first_token')};  "
        f"per token {line('per_token')} ms"
    )


def _milliseconds(value: float) -> str:
    return "-" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
