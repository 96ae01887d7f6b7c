"""Which earlier prompt shares the longest prefix with a new one, in bounded memory."""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np


class SharedPrefix(NamedTuple):
    row: int | None
    """None where no earlier prompt begins with the same token."""
    num_tokens: int


NO_SHARED_PREFIX = SharedPrefix(None, 0)


class SharedPrefixIndex:
    """Remembers prompts and finds the longest common prefix with any of them.

    Prompts are kept once each, as big-endian bytes, in sorted order: bytes then sort as the token ids do, and of all
    prompts the two neighbours of a new one share the longest prefix with it. A search is a bisection and two
    comparisons.

    Bound: when there are more than `max_prompts` different prompts or `max_tokens` tokens in all, the oldest are
    forgotten until at most half of either is left; a prompt that comes again counts as new. So what is found is the
    longest prefix among at least the last `max_prompts` / 2 different prompts, fewer only where these are longer than
    `max_tokens` / 2 together. A token takes 4 bytes.
    """

    def __init__(self, max_prompts: int = 65_536, max_tokens: int = 16_777_216) -> None:
        self._max_prompts = max_prompts
        self._max_bytes = 4 * max_tokens
        self._sorted: list[bytes] = []
        self._rows: dict[bytes, int] = {}  # oldest first; the first row that had the prompt
        self._num_bytes = 0
        self._last_row: int | None = None
        self._last_answer = NO_SHARED_PREFIX

    def __len__(self) -> int:
        """Prompts that are remembered."""
        return len(self._rows)

    def add(self, row: int, token_ids: np.ndarray) -> SharedPrefix:
        """The earlier row with the longest common prefix, its length; then remember this prompt.

        Of rows with equal prompts the first is named. The samples of a row arrive one after the other and have the
        answer of the first: a row is never its own predecessor.
        """
        if row != self._last_row:
            self._last_row = row
            self._last_answer = self._find_and_keep(row, token_ids.astype(">u4").tobytes())
        return self._last_answer

    def _find_and_keep(self, row: int, key: bytes) -> SharedPrefix:
        first_row = self._rows.pop(key, None)
        if first_row is not None:
            self._rows[key] = first_row
            return SharedPrefix(first_row, len(key) // 4)
        place = bisect_left(self._sorted, key)
        answer = self._best([self._sorted[i] for i in (place - 1, place) if 0 <= i < len(self._sorted)], key)
        self._sorted.insert(place, key)
        self._rows[key] = row
        self._num_bytes += len(key)
        if len(self._rows) > self._max_prompts or self._num_bytes > self._max_bytes:
            self._forget_oldest()
        return answer

    def _best(self, neighbours: list[bytes], key: bytes) -> SharedPrefix:
        found = [SharedPrefix(self._rows[other], _common_tokens(other, key)) for other in neighbours]
        longest = max((shared.num_tokens for shared in found), default=0)
        if longest == 0:
            return NO_SHARED_PREFIX
        return min(shared for shared in found if shared.num_tokens == longest)

    def _forget_oldest(self) -> None:
        """Down to half of each bound, so that the sorted list is rebuilt once in a long while."""
        for key in list(self._rows):
            if len(self._rows) <= self._max_prompts // 2 and self._num_bytes <= self._max_bytes // 2:
                break
            del self._rows[key]
            self._num_bytes -= len(key)
        self._sorted = [key for key in self._sorted if key in self._rows]


def _common_tokens(first: bytes, second: bytes) -> int:
    if first[:4] != second[:4]:
        return 0
    length = min(len(first), len(second)) // 4
    differs = np.frombuffer(first, "<u4", length) != np.frombuffer(second, "<u4", length)
    place = int(differs.argmax()) if length else 0
    return place if length and differs[place] else length
