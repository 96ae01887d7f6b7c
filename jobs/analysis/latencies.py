"""What each request waited for, in milliseconds."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jobs.analysis import tables
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.segments import Segment


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Columns of one segment's requests, [requests]; NaN where a request never got so far."""

    segment: Segment

    def _time(self, name: str) -> np.ndarray:
        column = self.segment.request(name)
        return np.where(column < 0, np.nan, column / 1e6)

    @cached_property
    def arrived(self) -> np.ndarray:
        return self._time("arrived_ns")

    @cached_property
    def finished(self) -> np.ndarray:
        return self._time("finished_ns")

    @cached_property
    def total(self) -> np.ndarray:
        return self.finished - self.arrived

    @cached_property
    def queued(self) -> np.ndarray:
        return self._time("first_scheduled_ns") - self.arrived

    @cached_property
    def to_first_token(self) -> np.ndarray:
        return self._time("first_token_ns") - self.arrived

    @cached_property
    def prefill(self) -> np.ndarray:
        return self._time("first_token_ns") - self._time("first_scheduled_ns")

    @cached_property
    def decode(self) -> np.ndarray:
        """From the first token to the end, without what preemptions cost."""
        return self.finished - self._time("first_token_ns") - self.preempted

    @cached_property
    def per_token(self) -> np.ndarray:
        """Of the tokens after the first one."""
        tokens = self.segment.request("num_output_tokens").astype(np.float64) - 1
        return (self.finished - self._time("first_token_ns")) / np.where(tokens > 0, tokens, np.nan)

    @cached_property
    def preempted(self) -> np.ndarray:
        """From each preemption to the sequence's next step, summed."""
        segment, flat = self.segment, self.segment.sequences
        seq_ids = segment.request("seq_id")
        waited = np.zeros(len(seq_ids))
        at, preempted = segment.id_lists("preempted_seq_ids")
        if not len(at):
            return waited
        start_ms = segment.column("start_ns") / 1e6
        width = segment.num_steps + 1
        runs = np.sort(flat.seq_id * width + flat.step_row)
        found = np.searchsorted(runs, preempted * width + at, "right")
        back = np.where(found < len(runs), runs[np.minimum(found, len(runs) - 1)], -1)
        again = back // width == preempted  # else it never ran again
        lost = np.where(again, start_ms[back % width * again] - start_ms[at], 0.0)
        order = np.argsort(seq_ids)
        place = np.searchsorted(seq_ids[order], preempted)
        there = (place < len(order)) & (seq_ids[order][np.minimum(place, len(order) - 1)] == preempted)
        np.add.at(waited, order[place[there]], lost[there])
        return waited


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRow:
    row: int
    sample: int
    id: str
    queued_ms: float
    """Before its first step."""
    taken_ms: float
    """From there to its end."""
    reason: str


def slow_rows(run: RecordedRun, of: list[Latencies], count: int) -> list[SlowRow]:
    """The requests that took longest from their first step to their end, and what took them so long."""
    taken = np.concatenate([np.nan_to_num(latencies.total - latencies.queued) for latencies in of])
    if not len(taken):
        return []
    rows = np.concatenate([latencies.segment.request_rows for latencies in of])
    parts = {
        name: np.concatenate([np.nan_to_num(getattr(latencies, name)) for latencies in of])
        for name in ("queued", "prefill", "decode", "preempted")
    }
    tokens = tables.ints(run.requests, "num_output_tokens")[rows]
    prompt = tables.ints(run.requests, "num_prompt_tokens")[rows]
    preemptions = tables.ints(run.requests, "num_preemptions")[rows]
    slowest = np.argsort(-taken, kind="stable")[:count]
    requests = run.requests.select(["row", "sample", "id"]).take(rows[slowest]).to_pylist()
    usual_output, usual_prompt = f"(median {np.median(tokens):,.0f})", f"(median {np.median(prompt):,.0f})"
    found = []
    for i, request in zip(slowest.tolist(), requests, strict=True):
        spent = {name: float(amounts[i]) for name, amounts in parts.items()}
        often = "once" if preemptions[i] == 1 else f"{preemptions[i]} times"
        words = {
            "prefill": f"{seconds(spent['prefill'])} for a prompt of {prompt[i]:,} tokens {usual_prompt}",
            "decode": f"{seconds(spent['decode'])} for {tokens[i]:,} output tokens {usual_output}",
            "preempted": f"preempted {often}, {seconds(spent['preempted'])} until it ran again",
        }
        chosen = sorted((name for name in words if spent[name] >= 0.2 * taken[i]), key=lambda name: -spent[name])
        reason = "; ".join(words[name] for name in chosen)
        found.append(SlowRow(**request, queued_ms=spent["queued"], taken_ms=float(taken[i]), reason=reason))
    return found


def seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 100 else f"{milliseconds:.1f} ms"
