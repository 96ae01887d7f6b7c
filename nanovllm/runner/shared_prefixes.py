"""Which rows of a batch share their leading KV blocks, from the block tables alone. Pure numpy."""

from dataclasses import dataclass

import numpy as np

MIN_MEMBERS = 4
MIN_SAVED_TOKENS = 4096
"""Tokens whose keys and values need not be read again, below which a group costs more than it saves."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Rows whose tables begin with the same `num_blocks` blocks."""

    rows: np.ndarray
    num_blocks: int


def find_groups(tables: np.ndarray, num_full_blocks: np.ndarray, block_size: int) -> list[PrefixGroup]:
    """Disjoint groups that together save most reads, each row in one at most.

    `tables` is int32 [rows, W]; only a row's first `num_full_blocks` [rows] count. Tables form a tree of blocks; a
    node's group is taken whole or split into its children's, whichever saves more.
    """
    if len(tables) < MIN_MEMBERS:
        return []
    masked = np.where(np.arange(tables.shape[1]) < num_full_blocks[:, None], tables, -1)
    rows = np.arange(len(tables))
    found: list[PrefixGroup] = []
    for members in _split(masked[:, 0], rows):
        found += _best(masked, members, 1, block_size)[1]
    return found


def _best(masked: np.ndarray, rows: np.ndarray, depth: int, block_size: int) -> tuple[int, list[PrefixGroup]]:
    """(saved tokens, groups) of rows that share their first `depth` blocks."""
    first = masked[rows[0]]
    same = (masked[rows] == first).all(0) & (first >= 0)
    differs = np.flatnonzero(~same[depth:])
    depth = depth + int(differs[0]) if len(differs) else masked.shape[1]
    saved = (len(rows) - 1) * depth * block_size
    whole = (saved, [PrefixGroup(rows, depth)]) if saved >= MIN_SAVED_TOKENS else (0, [])
    if depth == masked.shape[1]:
        return whole
    parts = [_best(masked, members, depth + 1, block_size) for members in _split(masked[rows, depth], rows)]
    split = sum(saved for saved, _ in parts), [group for _, groups in parts for group in groups]
    return max(whole, split, key=lambda choice: choice[0])


def _split(blocks: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Rows by equal block, of those that have one, where enough have the same."""
    order = np.argsort(blocks, kind="stable")
    ordered = blocks[order]
    bounds = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    groups = np.split(order, bounds)
    return [rows[group] for group in groups if len(group) >= MIN_MEMBERS and blocks[group[0]] >= 0]
