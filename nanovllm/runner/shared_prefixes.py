"""Which rows of a batch share their leading KV blocks, from the block tables alone. Pure numpy."""

from dataclasses import dataclass

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
    if len(tables) < MIN_MEMBERS:
        return []
    masked = np.where(np.arange(tables.shape[1]) < num_full_blocks[:, None], tables, -1)
    found: list[PrefixGroup] = []
    for members in _split(masked[:, 0], np.arange(len(tables))):
        found += _best(masked, members, 1, block_size, MAX_FORKS)[1]
    return found


def _best(
    masked: np.ndarray, rows: np.ndarray, depth: int, block_size: int, forks: int
) -> tuple[int, list[PrefixGroup]]:
    """(saved tokens, groups) of rows that share their first `depth` blocks, the tree forking `forks` times at most."""
    best: tuple[int, list[PrefixGroup]] = (0, [])
    while True:
        rest = masked[rows, depth:]
        differs = np.flatnonzero(((rest != rest[0]) | (rest[0] < 0)).any(0))
        depth += int(differs[0]) if len(differs) else rest.shape[1]
        saved = (len(rows) - 1) * depth * block_size
        if saved >= MIN_SAVED_TOKENS and saved > best[0]:
            best = saved, [PrefixGroup(rows, depth)]
        parts = _split(masked[rows, depth], rows) if depth < masked.shape[1] else []
        if len(parts) != 1:
            break
        rows, depth = parts[0], depth + 1
    if forks:
        below = [_best(masked, members, depth + 1, block_size, forks - 1) for members in parts]
        apart = sum(saved for saved, _ in below), [group for _, groups in below for group in groups]
        best = max(best, apart, key=lambda choice: choice[0])
    return best


def _split(blocks: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Rows by equal block, of those that have one, where enough have the same."""
    order = np.argsort(blocks, kind="stable")
    ordered = blocks[order]
    bounds = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    groups = np.split(order, bounds)
    return [rows[group] for group in groups if len(group) >= MIN_MEMBERS and blocks[group[0]] >= 0]
