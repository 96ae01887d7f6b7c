"""The block events of a step, collected as columns and made into rows of one array when someone asks for them."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from nanovllm.events import ALLOCATE, BLOCK_EVENT_ROW, EVENT_KINDS, EVENT_REASONS, FREE, HIT, BlockEvents

KIND_CODES = {kind: code for code, kind in enumerate(EVENT_KINDS)}
REASON_CODES = {reason: code for code, reason in enumerate(EVENT_REASONS)}
NO_REASON = REASON_CODES[None]
_CHANGES = np.array([{ALLOCATE: -1, HIT: -1, FREE: 1}.get(kind, 0) for kind in EVENT_KINDS])
"""By kind: how many more blocks are free after an event."""
_NO_EVENTS = BlockEvents(np.empty(0, BLOCK_EVENT_ROW))


class _Entry(NamedTuple):
    """Columns of BLOCK_EVENT_ROW."""

    event: int | np.ndarray
    reason: int | np.ndarray
    has_hash: bool | np.ndarray
    block_id: np.ndarray
    ref_count: int | np.ndarray
    seq_id: int | np.ndarray
    block_hash: int | np.ndarray


def by_step(
    events: BlockEvents, seq_ids: np.ndarray, takes_in: np.ndarray, publishes_in: np.ndarray
) -> tuple[np.ndarray, BlockEvents]:
    """Events of several steps as they would have come step by step: (the step of each, the events).

    In these steps the sequences [sequences] take empty blocks and have blocks published, each one at most, in the
    step that the other two arrays say. What all take comes first in `events`, then what is published.
    """
    rows = events.rows
    takes = rows["event"] == KIND_CODES[ALLOCATE]
    by_id = np.argsort(seq_ids)
    place = by_id[np.searchsorted(seq_ids, rows["seq_id"], sorter=by_id)]
    steps = np.where(takes, takes_in[place], publishes_in[place]).astype(np.int64)
    order = np.argsort(steps, kind="stable")  # a step takes its blocks before it publishes any
    in_order = rows[order]
    if len(rows):
        in_order["free_blocks"] = rows["free_blocks"][-1] + np.count_nonzero(takes) - np.cumsum(takes[order])
    return steps[order], BlockEvents(in_order)


class BlockEventLog:
    """Takes the events of many blocks in one go: each column is a value for all of them, or an array.

    Arrays are kept as they are, so that events nobody listens to cost next to nothing: who hands one over changes it
    no more. How many blocks were free after each event follows from the events and from how many are free at the end.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(
        self,
        event: int | np.ndarray,
        block_ids: np.ndarray,
        seq_ids: int | np.ndarray,
        *,
        ref_counts: int | np.ndarray,
        hashes: int | np.ndarray = 0,
        has_hash: bool | np.ndarray = False,
        reason: int | np.ndarray = NO_REASON,
    ) -> None:
        self._entries.append(_Entry(event, reason, has_hash, block_ids, ref_counts, seq_ids, hashes))

    def events(self, free_blocks: int) -> BlockEvents:
        """What has been added since the last drain; `free_blocks` are free now."""
        if not self._entries:
            return _NO_EVENTS
        ends = list(accumulate(len(entry.block_id) for entry in self._entries))
        rows = np.zeros(ends[-1], BLOCK_EVENT_ROW)
        for name, values in zip(_Entry._fields, zip(*self._entries, strict=True), strict=True):
            column, first = rows[name], 0
            for end, value in zip(ends, values, strict=True):
                column[first:end] = value
                first = end
        freed = _CHANGES[rows["event"]]
        freed[(rows["event"] == KIND_CODES[HIT]) & (rows["ref_count"] > 1)] = 0  # others use the block too
        rows["free_blocks"] = free_blocks - freed.sum() + np.cumsum(freed)
        return BlockEvents(rows)

    def drain(self, free_blocks: int) -> BlockEvents:
        """As `events`, which are gone then."""
        events = self.events(free_blocks)
        self._entries.clear()
        return events

    def discard(self) -> None:
        """Forget them: nobody listens."""
        self._entries.clear()
