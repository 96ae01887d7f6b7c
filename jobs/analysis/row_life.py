"""The life of one row, from the records: what happened to each of its sequences, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jobs.analysis.ledger import KIND, Ledger
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.segments import Segment, segments
from jobs.analysis.time_ledger import tail_steps
from nanovllm.events import COMMIT, EVICT, HIT

MOST_BLOCKS = 6
"""Blocks that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class SequenceLife:
    """One request of the row in one attempt."""

    segment: Segment
    request: dict[str, Any]

    def lines(self) -> Iterator[str]:
        request, segment = self.request, self.segment
        several = f" of attempt {segment.attempt.number}" if len(segment.run.attempts) > 1 else ""
        yield (
            f"row {request['row']} ({request['id']}), sample {request['sample']}: "
            f"seq_id {request['seq_id']}{several}; {request['num_prompt_tokens']:,} tokens in, "
            f"{request['num_output_tokens']:,} out, ended by {request['finish_reason']}"
        )
        yield f"  {0:9.1f} ms  arrived, {request['arrived_ns'] / 1e9:.3f} s after the run's start"
        if not len(self._steps):
            yield "              never scheduled"
        yield from self._events()
        yield f"  {self._ms(request['finished_ns']):9.1f} ms  ended: {request['finish_reason']}"
        yield from self._afterwards()

    @cached_property
    def _entries(self) -> np.ndarray:
        """Its entries of the segment's sequences, in the order of steps."""
        return np.flatnonzero(self.segment.sequences.seq_id == self.request["seq_id"])

    @cached_property
    def _steps(self) -> np.ndarray:
        """Rows of the segment's steps that it took part in."""
        return self.segment.sequences.step_row[self._entries]

    @cached_property
    def _own_events(self) -> np.ndarray:
        return np.flatnonzero(self.segment.events.seq_id == self.request["seq_id"])

    @cached_property
    def _ledger(self) -> Ledger:
        return self.segment.ledger or Ledger(self.segment.events, 0)

    @cached_property
    def _row_of_seq(self) -> dict[int, int]:
        segment = self.segment
        return dict(zip(segment.request("seq_id").tolist(), segment.request("row").tolist(), strict=True))

    def _who(self, seq_id: int) -> str:
        if seq_id == self.request["seq_id"]:
            return "itself"
        row = self._row_of_seq.get(int(seq_id))
        return f"seq_id {seq_id}, whose request was not recorded" if row is None else f"row {row}"

    def _ms(self, time_ns: Any) -> float:
        return (time_ns - self.request["arrived_ns"]) / 1e6

    def _events(self) -> Iterator[str]:
        segment, flat = self.segment, self.segment.sequences
        start, end, step = (segment.column(name) for name in ("start_ns", "end_ns", "step"))
        at, preempted = segment.id_lists("preempted_seq_ids")
        preemptions = at[preempted == self.request["seq_id"]].tolist()
        chunk, decodes, queued_since = 0, [], self.request["arrived_ns"]
        for entry, row in zip(self._entries.tolist(), self._steps.tolist(), strict=True):
            while preemptions and preemptions[0] < row:
                gone = preemptions.pop(0)
                yield from self._decoded(decodes)
                decodes, chunk, queued_since = [], 0, start[gone]
                yield from self._preempted(gone)
            if self._is_decode(row, entry):
                decodes.append(row)
                continue
            if chunk == 0:
                yield from self._admitted(row, entry, queued_since)
            chunk += 1
            rest = "the last one, which samples a token" if flat.sampled[entry] else "more to come"
            yield (
                f"  {self._ms(end[row]):9.1f} ms  step {step[row]}: chunk {chunk}, {flat.num_tokens[entry]:,} tokens, "
                f"{flat.context_len[entry]:,} there now; {rest}"
            )
        yield from self._decoded(decodes)
        for gone in preemptions:
            yield from self._preempted(gone)

    def _is_decode(self, row: int, entry: int) -> bool:
        """A batch has its decodes first."""
        first = np.searchsorted(self.segment.sequences.step_row, row)
        return entry - first < self.segment.column("num_decode_tokens")[row]

    def _admitted(self, row: int, entry: int, since_ns: Any) -> Iterator[str]:
        segment = self.segment
        start, waiting = segment.column("start_ns")[row], segment.column("num_waiting")[row]
        queued = f"scheduled after {(start - since_ns) / 1e6:.1f} ms in the queue"
        step = segment.column("step")[row]
        yield f"  {self._ms(start):9.1f} ms  step {step}: {queued}; {waiting:,} rows still wait"
        hits = self._hits_of_step(int(segment.column("step")[row]))
        cached = int(segment.sequences.cached_tokens[entry])
        if cached:
            yield f"              {cached:,} tokens from the prefix cache: {self._named_hits(hits)}"
        yield from self._missed_prefix(row, cached, hits)

    def _hits_of_step(self, step: int) -> np.ndarray:
        events, own = self.segment.events, self._own_events
        return own[(events.step[own] == step) & (events.kind[own] == KIND[HIT])]

    def _named_hits(self, hits: np.ndarray) -> str:
        events = self.segment.events
        by_row: dict[str, list[int]] = {}
        for hit in hits.tolist():
            commit = self._ledger.last_commit[hit]
            who = self._who(int(events.seq_id[commit])) if commit >= 0 else "nobody that is recorded"
            by_row.setdefault(who, []).append(int(events.block_id[hit]))
        return "; ".join(f"block{'s' if len(b) > 1 else ''} {_listed(b)} from {who}" for who, b in by_row.items())

    def _missed_prefix(self, row: int, cached: int, hits: np.ndarray) -> Iterator[str]:
        """What it has in common with an earlier row and did not find, and who took that away."""
        shared, size = self.request["shared_prefix_tokens"], self.segment.block_size
        if not shared or size is None or shared // size <= len(hits):
            return
        common = self.request["shared_prefix_row"]
        yield f"              begins like row {common} for {shared:,} tokens; {shared - cached:,} were not found"
        if self._is_computed_with(common, row):
            yield f"              row {common} is computed in the same step: nothing to find yet"
        yield from self._evicted_from(common, range(len(hits), shared // size), self._first_event_of(row))

    def _is_computed_with(self, common: int, row: int) -> bool:
        """Whether this step is the first one of that row."""
        flat = self.segment.sequences
        seq_ids = [seq_id for seq_id, other in self._row_of_seq.items() if other == common]
        entries = np.flatnonzero(np.isin(flat.seq_id, seq_ids))
        return bool(len(entries)) and flat.step_row[entries[0]] == row

    def _first_event_of(self, row: int) -> int:
        """The first event of its own in this step, or the first of any later step."""
        events, step = self.segment.events, int(self.segment.column("step")[row])
        own = self._own_events[events.step[self._own_events] == step]
        return int(own[0]) if len(own) else int(np.searchsorted(events.step, step + 1))

    def _evicted_from(self, row: int, columns: range, before: int) -> Iterator[str]:
        """Who evicted the blocks that `row` published in these columns, before this event."""
        events, seq_ids = self.segment.events, [s for s, r in self._row_of_seq.items() if r == row]
        place = np.arange(len(events))
        published = (place < before) & (events.kind == KIND[COMMIT]) & np.isin(events.seq_id, seq_ids)
        published &= (self._ledger.column >= columns.start) & (self._ledger.column < columns.stop)
        gone: dict[str, list[int]] = {}
        for commit in np.flatnonzero(published).tolist():
            evicts = (events.block_id == events.block_id[commit]) & (events.kind == KIND[EVICT])
            evicts &= (place > commit) & (place < before)
            if evicts.any():
                at = int(evicts.argmax())
                who = f"{self._who(int(events.seq_id[at]))} in step {events.step[at]}"
                gone.setdefault(who, []).append(int(events.block_id[at]))
        for who, blocks in gone.items():
            yield f"              evicted before, for {who}: block{'s' if len(blocks) > 1 else ''} {_listed(blocks)}"

    def _decoded(self, rows: list[int]) -> Iterator[str]:
        if not rows:
            return
        segment = self.segment
        step, end, batch = (segment.column(name) for name in ("step", "end_ns", "batch_size"))
        before = end[rows[0] - 1] if rows[0] else segment.column("start_ns")[rows[0]]
        each = (end[rows[-1]] - before) / 1e6 / len(rows)
        least, most = batch[rows].min(), batch[rows].max()
        sizes = f"a batch of {most}" if least == most else f"batches of {least} to {most}"
        took = f"step, {each:.1f} ms," if len(rows) == 1 else f"steps, {each:.1f} ms each,"
        steps = f"step {step[rows[0]]}" if len(rows) == 1 else f"steps {step[rows[0]]} to {step[rows[-1]]}"
        tail = int(tail_steps(segment)[rows].sum())
        alone = f"; {tail:,} of them in the tail, with few rows left" if tail else ""
        halves = int(segment.in_halves[rows].sum())
        apart = f"; {halves:,} of them in halves" if halves else ""
        yield f"  {self._ms(end[rows[-1]]):9.1f} ms  {steps}: {len(rows):,} decode {took} in {sizes}{apart}{alone}"

    def _preempted(self, row: int) -> Iterator[str]:
        segment, events = self.segment, self.segment.events
        step = int(segment.column("step")[row])
        freed = events.gives & (events.step == step) & (events.seq_id == self.request["seq_id"])
        takers = np.unique(events.seq_id[events.takes & (events.step == step)]).tolist()
        taken = ", ".join(self._who(seq_id) for seq_id in takers[:MOST_BLOCKS]) or "nobody: it lacked one itself"
        yield (
            f"  {self._ms(segment.column('start_ns')[row]):9.1f} ms  step {step}: preempted, gives back "
            f"{int(freed.sum())} blocks; the step's new blocks went to {taken}"
        )

    def _afterwards(self) -> Iterator[str]:
        """What became of the blocks that it published."""
        events, own = self.segment.events, self._own_events
        commits = own[events.kind[own] == KIND[COMMIT]]
        if not len(commits):
            return
        hits = np.flatnonzero((events.kind == KIND[HIT]) & np.isin(self._ledger.last_commit, commits))
        evicts = np.flatnonzero((events.kind == KIND[EVICT]) & np.isin(self._ledger.last_commit, commits))
        others = [self._who(s) for s in dict.fromkeys(events.seq_id[hits].tolist()) if s != self.request["seq_id"]]
        used = f"reused by {_listed(others)}" if others else "reused by none"
        yield f"              it published {len(commits):,} blocks: {used}; {len(evicts):,} were evicted"


def _listed(items: list[Any]) -> str:
    shown = ", ".join(map(str, items[:MOST_BLOCKS]))
    return f"{shown}, ... ({len(items)})" if len(items) > MOST_BLOCKS else shown


def lives_of_row(run: RecordedRun, row: int) -> list[SequenceLife]:
    """Every request of the row, over attempts and samples, in the order in which they ended."""
    found = []
    for segment in segments(run):
        here = segment.request_rows[segment.request("row") == row]
        found += [SequenceLife(segment=segment, request=r) for r in run.requests.take(here).to_pylist()]
    return found
