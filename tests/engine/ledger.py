"""The pool of KV blocks rebuilt from its block events alone; every event is checked against the state so far."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from nanovllm.events import (
    ABORTED,
    ALLOCATE,
    COMMIT,
    EVICT,
    FINISHED,
    FREE,
    HIT,
    PREEMPTED,
    RELEASE,
    BlockEvent,
)


class LedgerError(ValueError):
    """An event that cannot follow from those before it."""


class Ledger:
    """Replays block events in the order in which they were published.

    Tables, reference counts, hashes and the number of free blocks follow from the events; what an event claims of
    them is compared. Raises LedgerError at the first one that does not fit.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.tables: dict[int, list[int]] = {}
        """Block tables of the sequences that hold blocks, by seq_id."""
        self.ref_counts: dict[int, int] = defaultdict(int)
        self.hashes: dict[int, int] = {}
        """Of the blocks that hold a reusable prefix."""

    @property
    def free_blocks(self) -> int:
        return self.num_blocks - len(self.ref_counts)

    @property
    def cached_blocks(self) -> int:
        """Blocks without a user that still hold a reusable prefix."""
        return len(self.hashes.keys() - self.ref_counts.keys())

    def apply(self, event: BlockEvent) -> None:
        block = event.block_id
        if not 0 <= block < self.num_blocks:
            raise LedgerError(f"{event}: there are {self.num_blocks} blocks")
        match event.event:
            case kind if kind == ALLOCATE:
                self._require(block not in self.ref_counts, event, "the block is in use")
                self._require(block not in self.hashes, event, "the block still holds a prefix")
                self._take(event)
            case kind if kind == HIT:
                self._require(block in self.hashes, event, "the block holds no prefix")
                self._take(event)
            case kind if kind == COMMIT:
                self._require(block in self.tables.get(event.seq_id, ()), event, "the block is not the sequence's")
                self._require(block not in self.hashes, event, "the block has been committed before")
                self._require(event.block_hash is not None, event, "a commit has a hash")
                self.hashes[block] = event.block_hash
            case kind if kind == EVICT:
                self._require(block not in self.ref_counts, event, "the block is in use")
                self._require(block in self.hashes, event, "the block holds no prefix")
                self._require(event.block_hash == self.hashes.pop(block), event, "another prefix is given up")
            case kind if kind in (FREE, RELEASE):
                self._give_back(event)
            case _:
                raise LedgerError(f"{event}: no such event")
        self._check_claims(event)

    def _take(self, event: BlockEvent) -> None:
        table = self.tables.setdefault(event.seq_id, [])
        self._require(event.block_id not in table, event, "the sequence has the block already")
        table.append(event.block_id)
        self.ref_counts[event.block_id] += 1

    def _give_back(self, event: BlockEvent) -> None:
        block, table = event.block_id, self.tables.get(event.seq_id)
        self._require(event.reason in (FINISHED, PREEMPTED, ABORTED), event, "a reason is missing")
        self._require(bool(table) and table[-1] == block, event, "the block is not the last of the sequence's table")
        table.pop()
        if not table:
            del self.tables[event.seq_id]
        self.ref_counts[block] -= 1
        last = self.ref_counts[block] == 0
        self._require(last == (event.event == FREE), event, f"{self.ref_counts[block]} users are left")
        if last:
            del self.ref_counts[block]

    def _check_claims(self, event: BlockEvent) -> None:
        block = event.block_id
        self._require(event.ref_count == self.ref_counts.get(block, 0), event, "the reference count differs")
        self._require(event.free_blocks == self.free_blocks, event, f"{self.free_blocks} blocks are free")
        if event.event != EVICT:  # there it is the hash that was given up
            self._require(event.block_hash == self.hashes.get(block), event, "the block holds another prefix")
        if event.event not in (FREE, RELEASE):
            self._require(event.reason is None, event, "only blocks that are given back have a reason")

    def _require(self, holds: bool, event: BlockEvent, otherwise: str) -> None:
        if not holds:
            raise LedgerError(f"{event}: {otherwise}")


def tables_at_steps(
    seq_ids: Mapping[int, Iterable[int]], events: Iterable[tuple[int, BlockEvent]]
) -> dict[int, dict[int, list[int]]]:
    """The block tables that each step used, from rows of the block_events table.

    `seq_ids` are the sequences of each step, `events` the rows' steps and events in published order. With look-ahead
    the next step is scheduled before a step's result is committed, so the rows' step numbers are not sorted. Blocks
    taken in a step belong to it; a sequence that gives blocks back in a step and is one of its sequences has used
    them in it.
    """
    by_step: dict[int, list[BlockEvent]] = defaultdict(list)
    for step, event in events:
        by_step[step].append(event)
    tables: dict[int, list[int]] = defaultdict(list)
    used: dict[int, dict[int, list[int]]] = {}
    for step in sorted(seq_ids.keys() | by_step.keys()):
        for event in by_step[step]:
            if event.event in (ALLOCATE, HIT):
                tables[event.seq_id].append(event.block_id)
        if step in seq_ids:
            used[step] = {seq_id: list(tables[seq_id]) for seq_id in seq_ids[step]}
        for event in by_step[step]:
            if event.event in (FREE, RELEASE):
                tables[event.seq_id].remove(event.block_id)
    return used
