"""The records of one replica and one attempt: where block state starts empty and times are of one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jobs.analysis import tables
from jobs.analysis.ledger import BlockEventColumns, Ledger
from jobs.analysis.recorded_run import Attempt, RecordedRun, StepSequences


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Its part of the tables, as columns. Entries of `sequences` count steps from the segment's first."""

    run: RecordedRun
    replica: int
    attempt: Attempt

    @cached_property
    def step_rows(self) -> np.ndarray:
        steps = self.run.steps
        return np.flatnonzero(self._are_here(steps["replica"].to_numpy(), steps["attempt"].to_numpy()))

    def _are_here(self, replica: np.ndarray, attempt: np.ndarray) -> np.ndarray:
        return (replica == self.replica) & (attempt == self.attempt.number)

    def column(self, name: str) -> np.ndarray:
        """A column of the steps."""
        return self.run.step_column(name)[self.step_rows]

    @cached_property
    def in_halves(self) -> np.ndarray:
        """bool [steps]: whether it is known of the step that it ran in halves; an older version did not write it."""
        return tables.flags(self.run.steps, "in_halves")[self.step_rows]

    @cached_property
    def num_blocks(self) -> int | None:
        """Blocks of the KV cache; from the steps where the manifest does not say; None where neither does."""
        known = self.attempt.engine.get("num_kv_blocks")
        if known is None and self.num_steps:
            return int(self.column("free_blocks")[0] + self.column("used_blocks")[0])
        return known

    @property
    def block_size(self) -> int | None:
        """Tokens in a block; None where the manifest does not say."""
        return self.attempt.engine.get("block_size")

    @cached_property
    def ledger(self) -> Ledger | None:
        """The replay of its block events; None where the number of blocks is not known."""
        return None if self.num_blocks is None else Ledger(self.events, self.num_blocks)

    @property
    def num_steps(self) -> int:
        return len(self.step_rows)

    @cached_property
    def sequences(self) -> StepSequences:
        flat = self.run.step_sequences
        place = np.full(self.run.steps.num_rows, -1, np.int64)
        place[self.step_rows] = np.arange(self.num_steps)
        here = np.flatnonzero(place[flat.step_row] >= 0)
        names = ("seq_id", "num_tokens", "context_len", "cached_tokens", "sampled")
        return StepSequences(step_row=place[flat.step_row[here]], **{name: getattr(flat, name)[here] for name in names})

    def id_lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list column of seq_ids as (place of the step, seq_id), one entry for each id."""
        lengths, ids = tables.lists(self.run.steps.select([name]).take(self.step_rows), name)
        return np.repeat(np.arange(len(lengths)), lengths), ids.astype(np.int64)

    @cached_property
    def events(self) -> BlockEventColumns:
        events = self.run.block_events
        here = self._are_here(events["replica"].to_numpy(), events["attempt"].to_numpy())
        return BlockEventColumns.of(events if here.all() else events.take(np.flatnonzero(here)))

    @cached_property
    def request_rows(self) -> np.ndarray:
        requests = self.run.requests
        return np.flatnonzero(self._are_here(requests["replica"].to_numpy(), requests["attempt"].to_numpy()))

    def request(self, name: str, null: int = -1) -> np.ndarray:
        """An integer column of the requests, with `null` for a null."""
        return tables.ints(self.run.requests, name, null)[self.request_rows]


def segments(run: RecordedRun) -> Iterator[Segment]:
    """In order of attempts, then replicas."""
    tables_there = (run.steps, run.block_events, run.requests)
    replicas = sorted({int(r) for table in tables_there for r in np.unique(table["replica"].to_numpy())} or {0})
    for attempt in run.attempts:
        for replica in replicas:
            yield Segment(run=run, replica=replica, attempt=attempt)
