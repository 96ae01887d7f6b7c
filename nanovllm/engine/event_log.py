"""The block events of a step, collected as rows of one array."""

import numpy as np

from nanovllm.events import BLOCK_EVENT_ROW, EVENT_KINDS, EVENT_REASONS, BlockEvents

KIND_CODES = {kind: code for code, kind in enumerate(EVENT_KINDS)}
REASON_CODES = {reason: code for code, reason in enumerate(EVENT_REASONS)}
NO_REASON = REASON_CODES[None]
_NO_EVENTS = BlockEvents(np.empty(0, BLOCK_EVENT_ROW))


class BlockEventLog:
    """Takes the events of many blocks in one go: each column is a value for all of them, or an array."""

    def __init__(self, capacity: int = 4096) -> None:
        self._num_rows = 0
        self._rows = np.empty(0, BLOCK_EVENT_ROW)
        self._grow(capacity)

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
        first = self._num_rows
        end = first + len(block_ids)
        if end > len(self._rows):
            self._grow(2 * end)
        self._num_rows = end
        self._event[first:end] = event
        self._reason[first:end] = reason
        self._has_hash[first:end] = has_hash
        self._block_id[first:end] = block_ids
        self._ref_count[first:end] = ref_counts
        self._free_blocks[first:end] = free_blocks
        self._seq_id[first:end] = seq_ids
        self._block_hash[first:end] = hashes

    def events(self) -> BlockEvents:
        """What has been added since the last drain."""
        return BlockEvents(self._rows[: self._num_rows].copy())

    def drain(self) -> BlockEvents:
        if not self._num_rows:
            return _NO_EVENTS
        events = self.events()
        self._num_rows = 0
        return events

    def _grow(self, capacity: int) -> None:
        rows = np.zeros(capacity, BLOCK_EVENT_ROW)
        rows[: self._num_rows] = self._rows[: self._num_rows]
        self._rows = rows
        self._event, self._reason, self._has_hash = rows["event"], rows["reason"], rows["has_hash"]
        self._block_id, self._ref_count, self._free_blocks = rows["block_id"], rows["ref_count"], rows["free_blocks"]
        self._seq_id, self._block_hash = rows["seq_id"], rows["block_hash"]
