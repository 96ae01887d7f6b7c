"""The block events of a step, collected as columns and made into rows of one array when someone asks for them."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from nanovllm.events import BLOCK_EVENT_ROW, EVENT_KINDS, EVENT_REASONS, BlockEvents

KIND_CODES = {kind: code for code, kind in enumerate(EVENT_KINDS)}
REASON_CODES = {reason: code for code, reason in enumerate(EVENT_REASONS)}
NO_REASON = REASON_CODES[None]
_NO_EVENTS = BlockEvents(np.empty(0, BLOCK_EVENT_ROW))


class _Entry(NamedTuple):
    """The columns of BLOCK_EVENT_ROW, in its order."""

    event: int | np.ndarray
    reason: int | np.ndarray
    has_hash: bool | np.ndarray
    block_id: np.ndarray
    ref_count: int | np.ndarray
    free_blocks: int | np.ndarray
    seq_id: int | np.ndarray
    block_hash: int | np.ndarray


class BlockEventLog:
    """Takes the events of many blocks in one go: each column is a value for all of them, or an array.

    Arrays are kept as they are, so that events nobody listens to cost next to nothing: who hands one over changes it
    no more.
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
        free_blocks: int | np.ndarray,
        hashes: int | np.ndarray = 0,
        has_hash: bool | np.ndarray = False,
        reason: int | np.ndarray = NO_REASON,
    ) -> None:
        self._entries.append(_Entry(event, reason, has_hash, block_ids, ref_counts, free_blocks, seq_ids, hashes))

    def events(self) -> BlockEvents:
        """What has been added since the last drain."""
        if not self._entries:
            return _NO_EVENTS
        ends = list(accumulate(len(entry.block_id) for entry in self._entries))
        rows = np.zeros(ends[-1], BLOCK_EVENT_ROW)
        for name, values in zip(_Entry._fields, zip(*self._entries, strict=True), strict=True):
            column, first = rows[name], 0
            for end, value in zip(ends, values, strict=True):
                column[first:end] = value
                first = end
        return BlockEvents(rows)

    def drain(self) -> BlockEvents:
        events = self.events()
        self._entries.clear()
        return events

    def discard(self) -> None:
        """Forget them: nobody listens."""
        self._entries.clear()
