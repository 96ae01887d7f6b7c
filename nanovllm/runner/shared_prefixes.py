"""Which rows of a batch share their leading KV blocks, from the block tables alone. Pure numpy."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MIN_MEMBERS = 4
MIN_SAVED_TOKENS = 4096
"""Tokens whose keys and values need not be read again, below which a group costs more than it saves."""
MAX_FORKS = 100
"""Branches of the tree of blocks that are followed one behind the other."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Rows whose tables begin with the same `num_blocks` blocks."""

    rows: np.ndarray
    num_blocks: int


def find_groups(tables: np.ndarray, num_full_blocks: np.ndarray, block_size: int) -> list[PrefixGroup]:
    """Disjoint groups of rows that share a prefix, each row in one at most.

    `tables` is int32 [rows, W]; only a row's first `num_full_blocks` [rows] count. Tables form a tree of blocks; a
    node's rows are one group, or its children's groups, whichever saves more.
    """
    tree = _Tree(tables, num_full_blocks, block_size)
    found: list[PrefixGroup] = []
    for members in tree.split(np.arange(len(tables)), 0):
        found += tree.best(members, 1, MAX_FORKS)[1]
    return found


class _Tree(NamedTuple):
    """The tables' blocks by depth: rows that have been together so far part where their blocks differ or end."""

    tables: np.ndarray
    num_full_blocks: np.ndarray
    block_size: int

    def best(self, rows: np.ndarray, depth: int, forks: int) -> tuple[int, list[PrefixGroup]]:
        """(saved tokens, groups) of rows that share their first `depth` blocks, with `forks` forks at most below."""
        best: tuple[int, list[PrefixGroup]] = (0, [])
        while True:
            depth = self._parting(rows, depth)
            saved = (len(rows) - 1) * depth * self.block_size
            if saved >= MIN_SAVED_TOKENS and saved > best[0]:
                best = saved, [PrefixGroup(rows, depth)]
            parts = self.split(rows, depth)
            if len(parts) != 1:
                break
            rows, depth = parts[0], depth + 1
        if forks:
            below = [self.best(members, depth + 1, forks - 1) for members in parts]
            apart = sum(saved for saved, _ in below), [group for _, groups in below for group in groups]
            best = max(best, apart, key=lambda choice: choice[0])
        return best

    def _parting(self, rows: np.ndarray, depth: int) -> int:
        """How many blocks rows have in common that share `depth`; where the first of them ends, they part."""
        end = int(self.num_full_blocks[rows].min())
        columns = self.tables[rows, depth:end]
        is_common = (columns == columns[0]).all(0)
        return end if is_common.all() else depth + int(is_common.argmin())

    def split(self, rows: np.ndarray, depth: int) -> list[np.ndarray]:
        """Rows by their block at `depth`, of those that have one, where enough have the same."""
        rows = rows[self.num_full_blocks[rows] > depth]
        if len(rows) < MIN_MEMBERS:
            return []
        blocks = self.tables[rows, depth]
        order = blocks.argsort(kind="stable")
        ordered = blocks[order]
        bounds = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1, [len(order)]))
        starts, ends = bounds[:-1], bounds[1:]
        enough = ends - starts >= MIN_MEMBERS
        places = zip(starts[enough].tolist(), ends[enough].tolist(), strict=True)
        return [rows[order[start:end]] for start, end in places]
