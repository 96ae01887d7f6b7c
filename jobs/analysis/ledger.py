"""The pool of KV blocks rebuilt from its block events alone, in whole columns.

An event's claims depend on what went before for its block, its sequence, or the pool. Sorting the events by one of
these, in time within it, makes each of the three a running sum or a look at the neighbour above.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from jobs.analysis import tables
from jobs.analysis.violation import Violation
from nanovllm.events import ABORTED, ALLOCATE, COMMIT, EVENT_KINDS, EVENT_REASONS, EVICT, FREE, HIT, PREEMPTED, RELEASE

KIND = {kind: code for code, kind in enumerate(EVENT_KINDS)}
REASON = {reason: code for code, reason in enumerate(EVENT_REASONS)}


@dataclass(frozen=True, kw_only=True)
class BlockEventColumns:
    """Block events of one replica and attempt, in the order in which they happened; arrays [events]."""

    step: np.ndarray
    kind: np.ndarray
    """Place in EVENT_KINDS; -1 for any other word."""
    block_id: np.ndarray
    seq_id: np.ndarray
    reason: np.ndarray
    """Place in EVENT_REASONS; -1 for any other word."""
    ref_count: np.ndarray
    block_hash: np.ndarray
    has_hash: np.ndarray
    free_blocks: np.ndarray

    @classmethod
    def of(cls, events: pa.Table) -> "BlockEventColumns":
        hashes = events["block_hash"].combine_chunks()
        return cls(
            step=tables.ints(events, "step"),
            kind=tables.codes(events, "event", EVENT_KINDS),
            block_id=tables.ints(events, "block_id"),
            seq_id=tables.ints(events, "seq_id"),
            reason=tables.codes(events, "reason", EVENT_REASONS),
            ref_count=tables.ints(events, "ref_count"),
            block_hash=hashes.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint64),
            has_hash=hashes.is_valid().to_numpy(zero_copy_only=False),
            free_blocks=tables.ints(events, "free_blocks"),
        )

    def __len__(self) -> int:
        return len(self.step)

    @cached_property
    def takes(self) -> np.ndarray:
        return (self.kind == KIND[ALLOCATE]) | (self.kind == KIND[HIT])

    @cached_property
    def gives(self) -> np.ndarray:
        return (self.kind == KIND[FREE]) | (self.kind == KIND[RELEASE])

    @cached_property
    def users(self) -> np.ndarray:
        """What the event adds to the users of its block, and to the length of its sequence's table."""
        return self.takes.astype(np.int64) - self.gives

    @cached_property
    def of_scheduling(self) -> np.ndarray:
        """Whether scheduling did it. A commit event is of neither: it may come with both and changes no count."""
        return self.takes | (self.kind == KIND[EVICT]) | (self.gives & (self.reason == REASON[PREEMPTED]))

    @cached_property
    def of_ending(self) -> np.ndarray:
        """Whether the end of a sequence did it, with the step's tokens."""
        return self.gives & (self.reason != REASON[PREEMPTED]) & (self.reason != REASON[ABORTED])


class Ledger:
    """What follows from the events. Properties hold as far as the events before are sound; `faults` says where not."""

    def __init__(self, events: BlockEventColumns, num_blocks: int) -> None:
        self.events = events
        self.num_blocks = num_blocks

    # Of each block

    @cached_property
    def _by_block(self) -> "_Grouped":
        return _Grouped(np.argsort(self.events.block_id, kind="stable"), self.events.block_id)

    @cached_property
    def ref_count(self) -> np.ndarray:
        """[events] Users of the event's block after it."""
        return self._by_block.running_sum(self.events.users)

    @cached_property
    def hash_before(self) -> tuple[np.ndarray, np.ndarray]:
        """([events] whether the event's block held a prefix just before it, [events] its hash)."""
        kind, grouped = self.events.kind, self._by_block
        sets = (kind == KIND[COMMIT]) | (kind == KIND[EVICT])
        last = grouped.last_before(sets)
        there = (last >= 0) & (kind[last] == KIND[COMMIT])
        return there, np.where(there, self.events.block_hash[last], np.uint64(0))

    @cached_property
    def last_commit(self) -> np.ndarray:
        """[events] The event that published the block most recently before; -1 where none has."""
        return self._by_block.last_before(self.events.kind == KIND[COMMIT])

    # Of each sequence

    @cached_property
    def depth(self) -> np.ndarray:
        """[events] Length of the table of the event's sequence after it."""
        grouped = _Grouped(np.argsort(self.events.seq_id, kind="stable"), self.events.seq_id)
        return grouped.running_sum(self.events.users)

    @cached_property
    def column(self) -> np.ndarray:
        """[events] Place of the block in the table of its sequence, which takes, gives back or commits it."""
        events = self.events
        column = np.where(events.takes, self.depth - 1, self.depth)
        taken = self._by_use.last_before(events.takes)
        commits = events.kind == KIND[COMMIT]
        return np.where(commits, np.where(taken >= 0, column[taken], -1), column)

    @cached_property
    def _by_use(self) -> "_Grouped":
        """Grouped by sequence and block."""
        use = self.events.seq_id * (self.num_blocks + 1) + self.events.block_id
        return _Grouped(np.argsort(use, kind="stable"), use)

    @cached_property
    def uses(self) -> np.ndarray:
        """[events] How often the event's block stands in the table of the event's sequence after it."""
        return self._by_use.running_sum(self.events.users)

    @cached_property
    def top_of_table(self) -> np.ndarray:
        """[events] The block that the sequence took last and still has, where the event gives one back; else -1."""
        events = self.events
        moves = np.flatnonzero(events.users)
        level = self.column[moves]
        order = moves[np.lexsort((moves, level, events.seq_id[moves]))]
        before = np.full(len(events), -1, np.int64)
        same = (events.seq_id[order[1:]] == events.seq_id[order[:-1]]) & (
            self.column[order[1:]] == self.column[order[:-1]]
        )
        pairs = same & events.takes[order[:-1]] & events.gives[order[1:]]
        before[order[1:][pairs]] = events.block_id[order[:-1][pairs]]
        return before

    # Of the pool

    @cached_property
    def free_blocks(self) -> np.ndarray:
        """[events] Blocks without a user after the event."""
        events = self.events
        taken = events.takes & (self.ref_count == 1)
        given = events.gives & (self.ref_count == 0)
        return self.num_blocks + np.cumsum(given.astype(np.int64) - taken)

    @cached_property
    def cached_blocks(self) -> np.ndarray:
        """[events] Blocks without a user that hold a reusable prefix, after the event."""
        events, there = self.events, self.hash_before[0]
        gone = (events.kind == KIND[EVICT]) | ((events.kind == KIND[HIT]) & (self.ref_count == 1))
        come = events.gives & (self.ref_count == 0) & there
        return np.cumsum(come.astype(np.int64) - gone)

    # What does not follow

    def faults(self) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        """(law, [events] whether the event breaks it, [events] what it should have been, where that is a number)."""
        events, kind = self.events, self.events.kind
        there, block_hash = self.hash_before
        users_before = self.ref_count - events.users
        yield "no such event", kind < 0, None
        yield "no such block", (events.block_id < 0) | (events.block_id >= self.num_blocks), None
        yield "a block is taken that is in use", (kind == KIND[ALLOCATE]) & (users_before != 0), users_before
        yield "a block is taken that still holds a prefix", (kind == KIND[ALLOCATE]) & there, None
        yield "a hit on a block that holds no prefix", (kind == KIND[HIT]) & ~there, None
        yield "a block stands twice in one table", events.takes & (self.uses > 1), self.uses
        yield "a reference count is negative", self.ref_count < 0, self.ref_count
        yield "a block is given back that the sequence does not have", events.gives & (self.uses < 0), None
        top = self.top_of_table
        yield "a block is given back that is not the last of the table", events.gives & (top != events.block_id), top
        freed = self.ref_count == 0
        yield "a block is free while it has users", (kind == KIND[FREE]) & ~freed, self.ref_count
        yield "a block without users is not free", (kind == KIND[RELEASE]) & freed, self.ref_count
        yield "a commit by a sequence that does not have the block", (kind == KIND[COMMIT]) & (self.uses != 1), None
        yield "a block is committed twice", (kind == KIND[COMMIT]) & there, None
        yield "a commit has no hash", (kind == KIND[COMMIT]) & ~events.has_hash, None
        yield "a block in use is evicted", (kind == KIND[EVICT]) & (self.ref_count != 0), self.ref_count
        yield "a block without a prefix is evicted", (kind == KIND[EVICT]) & ~there, None
        yield "the reference count differs from the block's users", events.ref_count != self.ref_count, self.ref_count
        yield "free and used blocks do not add up", events.free_blocks != self.free_blocks, self.free_blocks
        yield "the hash is not the one that was committed", self._other_hash(there, block_hash), None
        has_reason = events.reason != REASON[None]
        yield "a reason is missing or has no place here", (events.gives != has_reason) | (events.reason < 0), None
        yield "a hit at another place of the prefix than the block was committed for", self._displaced_hits(), None

    def _other_hash(self, there: np.ndarray, block_hash: np.ndarray) -> np.ndarray:
        """Events whose claim is not the prefix that their block holds; an eviction names the one it gives up."""
        events = self.events
        differs = (events.has_hash != there) | (there & (events.block_hash != block_hash))
        return differs & (events.kind != KIND[COMMIT])

    def _displaced_hits(self) -> np.ndarray:
        commit = self.last_commit
        hits = (self.events.kind == KIND[HIT]) & (commit >= 0)
        return hits & (self.column[commit] != self.column)

    def violations(self, replica: int, attempt: int) -> list[Violation]:
        """The first event that breaks each law, where one does."""
        found = []
        for law, broken, expected in self.faults():
            if broken.any():
                found.append(self._violation(law, int(broken.argmax()), expected, replica, attempt))
        return found

    def _violation(self, law: str, at: int, expected: np.ndarray | None, replica: int, attempt: int) -> Violation:
        events = self.events
        kind = EVENT_KINDS[events.kind[at]] if events.kind[at] >= 0 else "unknown"
        claims = f"{kind} with ref_count={events.ref_count[at]}, free_blocks={events.free_blocks[at]}"
        if events.has_hash[at]:
            claims += f", block_hash={events.block_hash[at]:#x}"
        return Violation(
            law=law,
            detail=claims if expected is None else f"{claims}; the events before give {expected[at]}",
            replica=replica,
            attempt=attempt,
            step=int(events.step[at]),
            block_id=int(events.block_id[at]),
            seq_id=int(events.seq_id[at]),
            event=at,
        )


class _Grouped:
    """Events sorted by a key, in time within it."""

    def __init__(self, order: np.ndarray, key: np.ndarray) -> None:
        self._order = order
        sorted_key = key[order]
        self._is_first = np.ones(len(order), np.bool_)
        self._is_first[1:] = sorted_key[1:] != sorted_key[:-1]

    def running_sum(self, amounts: np.ndarray) -> np.ndarray:
        """[events] Sum over the group up to and including the event."""
        sums = np.cumsum(amounts[self._order])
        firsts = np.flatnonzero(self._is_first)
        before = sums[firsts] - amounts[self._order][firsts]
        result = np.empty(len(sums), np.int64)
        result[self._order] = sums - np.repeat(before, np.diff(np.append(firsts, len(sums))))
        return result

    def last_before(self, marked: np.ndarray) -> np.ndarray:
        """[events] The last marked event of the group before the event; -1 where there is none."""
        places = np.arange(len(self._order))
        here = np.where(marked[self._order], places, -1)
        before = np.empty_like(here)
        before[1:] = here[:-1]
        if len(before):
            before[0] = -1
        latest = np.maximum.accumulate(before)
        first = np.maximum.accumulate(np.where(self._is_first, places, 0))
        result = np.empty(len(places), np.int64)
        result[self._order] = np.where(latest >= first, self._order[latest], -1)
        return result
