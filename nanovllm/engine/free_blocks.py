"""Blocks that nobody uses: a stack of the empty ones, a queue of those whose prefix can still be reused.

Block ids are intp, as numpy indexes with these at once.
"""

import numpy as np


class EmptyBlocks:
    """The block that was put back last is taken first."""

    def __init__(self, num_blocks: int) -> None:
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.intp)
        self._count = num_blocks

    def __len__(self) -> int:
        return self._count

    def put(self, blocks: np.ndarray) -> None:
        end = self._count + len(blocks)
        assert end <= len(self._stack), f"{end} of {len(self._stack)} blocks are empty"
        self._stack[self._count : end] = blocks
        self._count = end

    def take(self, count: int) -> np.ndarray:
        end, self._count = self._count, self._count - count
        return self._stack[self._count : end][::-1].copy()

    def tolist(self) -> list[int]:
        return self._stack[: self._count].tolist()


class CachedBlocks:
    """The block that was put there longest ago is taken first; any other can be removed.

    A removed block leaves its place in the queue behind, where it counts no more:

        0 ........ head ........ tail ........ twice the blocks
        taken      |  waiting    |  room
    """

    def __init__(self, num_blocks: int) -> None:
        self._queue = np.zeros(2 * num_blocks, np.intp)
        self._place = np.full(num_blocks, -1, np.int64)  # of each block in the queue; -1 where it is not in it
        self._head = self._tail = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, blocks: np.ndarray) -> None:
        if self._tail + len(blocks) > len(self._queue):
            self._close_ranks()
        first, self._tail = self._tail, self._tail + len(blocks)
        self._queue[first : self._tail] = blocks
        self._place[blocks] = np.arange(first, self._tail)
        self._count += len(blocks)

    def remove(self, blocks: np.ndarray) -> None:
        self._place[blocks] = -1
        self._count -= len(blocks)

    def take(self, count: int) -> np.ndarray:
        assert count <= self._count, f"{count} blocks asked for, {self._count} are cached"
        parts: list[np.ndarray] = []
        missing = count
        while missing:
            end = min(self._head + 2 * missing, self._tail)
            waiting, places = self._waiting(self._head, end)
            self._head = end if len(waiting) <= missing else int(places[missing])
            parts.append(waiting[:missing])
            missing -= len(parts[-1])
        blocks = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.remove(blocks)
        return blocks

    def tolist(self) -> list[int]:
        return self._waiting(self._head, self._tail)[0].tolist()

    def _waiting(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that count in a part of the queue, and their places."""
        blocks, places = self._queue[first:end], np.arange(first, end)
        counts = self._place[blocks] == places
        return blocks[counts], places[counts]

    def _close_ranks(self) -> None:
        blocks, _ = self._waiting(self._head, self._tail)
        self._head, self._tail = 0, len(blocks)
        self._queue[: self._tail] = blocks
        self._place[blocks] = np.arange(self._tail)
