"""What report.html draws, as plain values: aggregated where there is more than a screen can show, and saying so."""

import base64
from datetime import UTC, datetime
from typing import Any

import numpy as np

from jobs.analysis import tables
from jobs.analysis.block_map import block_map
from jobs.analysis.findings import Findings, unfinished
from jobs.analysis.latencies import slow_rows
from jobs.analysis.lives import KINDS, pieces
from jobs.analysis.prefixes import prefix_uses
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.sweep_screen import COLUMNS, SHARES, config_deltas, shown_value
from jobs.analysis.time_ledger import PLACES
from jobs.analysis.views import flat_config

MOST_STEPS = 12_000
"""Steps that are drawn one by one; of more, several in a row become one mark."""
MOST_ROWS = 12_000
"""Rows of the Gantt chart; of more, every 2nd, 3rd, ... is drawn."""
MAP_COLUMNS = 400
NUM_PREFIXES = 30
NUM_BINS = 50
PHASE_CODES = ("prefill", "mixed", "decode")

Data = dict[str, Any]


def run_data(figures: RunFigures) -> Data:
    """Times are milliseconds since the run's clock_zero, the pauses between its attempts left out."""
    run, ledger = figures.run, figures.ledger
    data: Data = {
        "kind": "run",
        "name": run.path.name,
        "status": run.status,
        "note": unfinished(figures),
        "facts": _facts(figures),
        "ledger": [[place, ledger[place] / 1e6, meaning] for place, meaning in figures.meanings.items()],
        "findings": [[finding.text, finding.evidence] for finding in Findings(figures).top()],
        "config": [[key, shown_value(value)] for key, value in flat_config(run).items()],
        "command": " ".join(map(str, run.manifest.get("command") or [])),
        "num_blocks": run.num_blocks,
        "paused": figures.paused_s * 1e3,
    }
    if figures.num_steps:
        data["steps"] = _steps(figures)
        data["rows"] = _rows(figures)
        data["slow"] = [
            [slow.row, slow.sample, slow.id, slow.taken_ms, slow.queued_ms, slow.reason]
            for slow in slow_rows(run, figures.latencies, 20)
        ]
        data["latencies"] = [
            _histogram(figures, name, title)
            for name, title in (("queued", "queue"), ("to_first_token", "first token"), ("per_token", "per token"))
        ]
        if run.num_blocks:
            data["blocks"] = _blocks(figures, run.num_blocks)
            data["prefixes"] = _prefixes(figures)
    return data


def sweep_data(name: str, all_figures: list[RunFigures]) -> Data:
    """What differs between the configurations, against the figures."""
    runs = [figures.run for figures in all_figures]
    facts = [figures.facts() for figures in all_figures]
    deltas = config_deltas(runs)
    return {
        "kind": "sweep",
        "name": name,
        "runs": [[run.path.name, run.status] for run in runs],
        "deltas": [[key, [shown_value(value) for value in values]] for key, values in deltas.items()],
        "figures": [[title, [_number(fact[key]) for fact in facts]] for key, title in COLUMNS.items()],
        "shares": [COLUMNS[key] for key in SHARES],
        "places": list(PLACES),
        "ledgers": [[figures.ledger[place] / 1e6 for place in PLACES] for figures in all_figures],
    }


def _facts(figures: RunFigures) -> list[list[str]]:
    manifest = figures.run.manifest
    counts = manifest.get("counts") or {}
    return [
        ["started", _moment(manifest.get("clock_zero"))],
        ["model", _text((manifest.get("model") or {}).get("path"))],
        ["device", _text(manifest.get("device"))],
        ["rows", f"{counts.get('answered', 0):,} answered, {counts.get('failed', 0):,} failed" if counts else "-"],
        ["tokens", f"{figures.num_prompt_tokens:,} in, {figures.num_sampled_tokens:,} out"],
        ["speed", f"{figures.tokens_per_s:,.1f} output tokens/s over the {figures.steps_s:,.2f} s of the steps"],
        ["steps", f"{figures.num_steps:,}"],
        ["prefix cache", f"{figures.hit_rate:.1%} of the prompt tokens, {figures.tokens_saved:,} tokens saved"],
        ["preemptions", f"{figures.num_preemptions:,}, {figures.num_recomputed_tokens:,} tokens computed again"],
    ]


def _steps(figures: RunFigures) -> Data:
    """Columns over the steps in the order of their ends; a mark stands for `each` steps that follow one another.

    A mark has the sums of tokens, times, preemptions and steps in halves, the means of the rest, and the commonest
    phase.
    """
    column = figures.run.step_column
    start_ns, end_ns = figures.step_spans
    order = np.argsort(end_ns, kind="stable")
    each = -(-len(order) // MOST_STEPS)
    firsts = np.arange(0, len(order), each)
    lasts = np.append(firsts[1:], len(order)) - 1

    def summed(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values[order].astype(np.float64), firsts)

    def mean(name: str) -> list[float]:
        return _rounded(summed(column(name)) / (lasts - firsts + 1), 1 if each > 1 else 0)

    phase = tables.codes(figures.run.steps, "phase", PHASE_CODES)
    commonest = np.argmax([summed(phase == code) for code in range(len(PHASE_CODES))], axis=0)
    real = column("num_prefill_tokens") + column("num_decode_tokens")
    host = column("schedule_ms") + column("prepare_ms") + column("postprocess_ms")
    sampled = np.bincount(figures.run.step_sequences.step_row, figures.run.step_sequences.sampled, len(order))
    return {
        "each": each,
        "start": _rounded(start_ns[order][firsts] / 1e6, 3),
        "end": _rounded(np.maximum.reduceat(end_ns[order], firsts) / 1e6, 3),
        "first": column("step")[order][firsts].tolist(),
        "phase": commonest.tolist(),
        "halves": _rounded(summed(tables.flags(figures.run.steps, "in_halves")), 0),
        "batch": mean("batch_size"),
        "prefill": _rounded(summed(column("num_prefill_tokens")), 0),
        "sampled": _rounded(summed(sampled), 0),
        "padding": _rounded(summed(column("padded_num_tokens") - real), 0),
        "forward": _rounded(summed(column("forward_ms")), 3),
        "host": _rounded(summed(host), 3),
        "waiting": mean("num_waiting"),
        "used": mean("used_blocks"),
        "cached": mean("cached_blocks"),
        "preempted": _rounded(summed(column("num_preempted")), 0),
    }


def _rows(figures: RunFigures) -> Data:
    """Pieces of the drawn rows' lives, as [row of the chart, kind, start, duration] one after the other."""
    requests = figures.run.requests
    count = requests.num_rows
    each = max(-(-count // MOST_ROWS), 1)
    order = np.argsort(tables.ints(requests, "arrived_ns"), kind="stable")[::each]
    place = np.full(count, -1, np.int64)
    place[order] = np.arange(len(order))
    flat: list[np.ndarray] = []
    for segment in figures.segments:
        found = pieces(segment)
        seq_ids = segment.request("seq_id")
        sort = np.argsort(seq_ids)
        at = np.searchsorted(seq_ids[sort], found.seq_id)
        there = at < len(sort)
        there[there] = seq_ids[sort][at[there]] == found.seq_id[there]
        line = np.full(len(at), -1, np.int64)
        line[there] = place[segment.request_rows[sort[at[there]]]]
        drawn = (line >= 0) & (found.end_ns > found.start_ns)
        paused = figures.pauses[segment.attempt.number]
        start, end = (found.start_ns[drawn] - paused) // 1000, (found.end_ns[drawn] - paused) // 1000
        flat.append(np.stack([line[drawn], found.kind[drawn], start, end - start], axis=1))
    all_pieces = np.concatenate(flat) if flat else np.empty((0, 4), np.int64)
    chosen = requests.select(["row", "sample", "id", "num_prompt_tokens", "num_output_tokens"]).take(order)
    return {
        "each": each,
        "kinds": list(KINDS),
        "pieces": _packed(all_pieces.astype(np.int32), "<i4"),
        "row": chosen["row"].to_pylist(),
        "id": chosen["id"].to_pylist(),
        "prompt": chosen["num_prompt_tokens"].to_pylist(),
        "output": chosen["num_output_tokens"].to_pylist(),
    }


def _blocks(figures: RunFigures, num_blocks: int) -> Data:
    start_ns, end_ns = figures.step_spans
    edges = np.linspace(int(start_ns.min()), int(end_ns.max()), MAP_COLUMNS).astype(np.int64)
    of_first = [segment for segment in figures.segments if segment.replica == figures.segments[0].replica]
    found = block_map(of_first, num_blocks, edges, figures.pauses)
    return {
        "start": edges[0] / 1e6,
        "end": edges[-1] / 1e6,
        "lines": len(found.first_block),
        "columns": MAP_COLUMNS,
        "stride": found.stride,
        "first": found.first_block.tolist(),
        "used": _packed(found.used, "u1"),
        "cached": _packed(found.cached, "u1"),
    }


def _prefixes(figures: RunFigures) -> Data:
    uses, total = prefix_uses(figures.segments, NUM_PREFIXES)
    return {
        "total": total,
        "uses": [
            [f"{use.block_hash:016x}", use.row, use.num_requests, use.num_prompt_tokens, use.num_cached_tokens]
            for use in uses
        ],
    }


def _histogram(figures: RunFigures, name: str, title: str) -> Data:
    """Counts in bins that grow by a constant factor; what took no time is in the first one."""
    found = np.concatenate([getattr(latencies, name) for latencies in figures.latencies])
    found = found[~np.isnan(found)]
    if not len(found):
        return {"title": title, "edges": [], "counts": [], "percentiles": []}
    low = max(float(found.min()), float(found.max()) / 1e4, 1e-3)
    edges = np.geomspace(low, max(float(found.max()), low * 1.01), NUM_BINS + 1)
    counts, _ = np.histogram(np.clip(found, edges[0], edges[-1]), bins=edges)
    percentiles = [[q, round(float(np.percentile(found, q)), 3)] for q in (50, 90, 99)]
    return {"title": title, "edges": _rounded(edges, 4), "counts": counts.tolist(), "percentiles": percentiles}


def _packed(values: np.ndarray, kind: str) -> str:
    """The array's bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(kind)).tobytes()).decode()


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return np.round(values).astype(np.int64).tolist() if digits == 0 else np.round(values, digits).tolist()


def _number(value: float) -> float | None:
    return None if value != value else float(value)


def _moment(text: str | None) -> str:
    return "-" if text is None else f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _text(value: object) -> str:
    return "-" if value is None else str(value)
