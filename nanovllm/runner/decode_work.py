"""Shares out a decode step's attention: chunks of each row's tokens, shared prefixes, what is merged. Pure numpy."""

import math
from dataclasses import dataclass

import numpy as np

from kernels.attention_work import ITEM_FIELDS
from nanovllm.runner.shared_prefixes import PrefixGroup

TILE = 64
"""Chunks are whole tiles of the kernel."""
MIN_CHUNK, MAX_CHUNK = 128, 1024
"""Tokens; below, an item's own cost shows, above, the last items of a launch run alone."""
PROGRAMS_PER_SM = 3
ITEMS_PER_PROGRAM = 4
"""How many items a decode kernel of that many programs should give to each, where the batch is small enough to choose;
one of twice as many programs gives half of it."""
LONGEST_SHARE, LONGEST_SHARE_BESIDE = 1.0, 1.5
"""How long a row may be without being cut, by what each program has to do in all. Beside another half of the step,
which fills the time, a launch may end less evenly."""
SHORT_SHARE = 0.45
"""The shorter quarter of the rows must be below this, by the same measure, to even out a launch's end."""
MANY_ROWS = 256
"""Beyond, the kernel runs twice as many programs (decode_tuning), each of which has half as much to do."""
MIN_PREFIX_CHUNK = 256
EXTRA_ITEMS, EXTRA_ITEMS_BESIDE = 2048, 1024
"""Items beyond one for each row, of a step and of a half that runs beside another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkLimits:
    """What the device's work list is sized for."""

    num_kv_heads: int
    num_programs: int
    """Of the decode kernel, resident at once, of up to MANY_ROWS rows."""
    num_prefix_programs: int
    members_per_item: int
    """Rows of a prefix item."""
    beside: bool = False
    """Whether another half of the step runs at the same time, and fills the gaps."""

    @property
    def extra_items(self) -> int:
        return EXTRA_ITEMS_BESIDE if self.beside else EXTRA_ITEMS

    def items(self, num_rows: int) -> int:
        """Most items of so many rows."""
        return num_rows + self.extra_items

    def prefix_items(self, num_rows: int) -> int:
        return num_rows + self.num_prefix_programs

    def partials(self, num_rows: int) -> int:
        per_head = -(-self.num_prefix_programs // self.num_kv_heads)
        return 2 * num_rows + self.extra_items + self.members_per_item * per_head


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkArrays:
    """The arrays of kernels/attention_work.py, int32, without its scratch."""

    items: np.ndarray
    merges: np.ndarray
    prefix_items: np.ndarray
    members: np.ndarray
    member_partials: np.ndarray


def share_out(
    slots: np.ndarray, context_lens: np.ndarray, groups: list[PrefixGroup], block_size: int, limits: WorkLimits
) -> WorkArrays:
    """Work for rows with `context_lens` [rows] tokens in the block tables' rows `slots` [rows].

    A row's partials follow each other: those of its shared prefix, then those of its own chunks, if these are several.
    """
    num_rows = len(slots)
    starts = np.zeros(num_rows, np.int64)
    prefix_chunks = np.zeros(num_rows, np.int64)
    plans = _plan_prefixes(groups, block_size, limits)
    for group, _, num_chunks in plans:
        starts[group.rows] = group.num_blocks * block_size
        prefix_chunks[group.rows] = num_chunks
    own = context_lens - starts
    sizes, counts = _chunks(own, limits)
    partials = prefix_chunks + np.where(counts > 1, counts, 0)
    first_partials = np.cumsum(partials) - partials
    merged = np.flatnonzero(counts > 1)
    merges = np.zeros((len(merged), 4), np.int32)
    merges[:, 0], merges[:, 1], merges[:, 2] = merged, first_partials[merged], partials[merged]
    items = _items(slots, starts, own, sizes, counts, first_partials, prefix_chunks)
    if not plans:
        empty = np.empty(0, np.int32)
        no_items = np.empty((0, ITEM_FIELDS), np.int32)
        return WorkArrays(items=items, merges=merges, prefix_items=no_items, members=empty, member_partials=empty)
    members = np.concatenate([group.rows for group, _, _ in plans]).astype(np.int32)
    return WorkArrays(
        items=items,
        merges=merges,
        prefix_items=_prefix_items(plans, slots, block_size, limits.members_per_item),
        members=members,
        member_partials=first_partials[members].astype(np.int32),
    )


def _chunks(own: np.ndarray, limits: WorkLimits) -> tuple[np.ndarray, np.ndarray]:
    """Each row's chunk size, in whole tiles if it is cut, and how many chunks its `own` tokens make."""
    total = int(own.sum())
    share = total * limits.num_kv_heads / limits.num_programs
    if _shares_out_evenly(own, share, limits):
        return own, np.ones_like(own)
    wanted = share / ITEMS_PER_PROGRAM
    size = max(min(max(wanted, MIN_CHUNK), MAX_CHUNK), total / limits.extra_items)
    size = math.ceil(size / TILE) * TILE
    counts = -(-own // size)
    # The same number of chunks, of nearly equal size: a short last one costs almost as much as a long one.
    sizes = -(-own // (counts * TILE)) * TILE
    return sizes, counts


def _shares_out_evenly(own: np.ndarray, share: float, limits: WorkLimits) -> bool:
    """Whether rows as they are, longest first, give each program about its `share` of all tokens."""
    if limits.beside:
        return bool(own.max() <= share * LONGEST_SHARE_BESIDE)
    if own.max() > share * LONGEST_SHARE * (0.5 if len(own) > MANY_ROWS else 1.0):
        return False
    quarter = len(own) // 4
    return bool(np.partition(own, quarter)[quarter] <= share * SHORT_SHARE)


def _items(
    slots: np.ndarray,
    starts: np.ndarray,
    own: np.ndarray,
    sizes: np.ndarray,
    counts: np.ndarray,
    first_partials: np.ndarray,
    prefix_chunks: np.ndarray,
) -> np.ndarray:
    """Longest first, so that the launch ends on small ones."""
    if counts.max() == 1:
        rows, chunk = np.arange(len(slots)), 0
        first, length = starts, own
    else:
        rows = np.repeat(np.arange(len(slots)), counts)
        chunk = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        offset = chunk * sizes[rows]
        first = starts[rows] + offset
        length = np.minimum(own[rows] - offset, sizes[rows])
    items = np.zeros((len(rows), ITEM_FIELDS), np.int32)
    items[:, 0], items[:, 1], items[:, 2], items[:, 3] = rows, slots[rows], first, first + length
    several = counts[rows] > 1
    items[:, 4] = np.where(several, first_partials[rows] + prefix_chunks[rows] + chunk, -1)
    items[:, 5] = first_partials[rows]
    items[:, 6] = np.where(several, 0, prefix_chunks[rows])
    most = np.iinfo(np.uint16).max  # 16-bit keys are sorted by radix
    order = np.argsort((most - np.minimum(length, most)).astype(np.uint16), kind="stable")
    return items[order]


def _plan_prefixes(
    groups: list[PrefixGroup], block_size: int, limits: WorkLimits
) -> list[tuple[PrefixGroup, int, int]]:
    """(group, tokens of a chunk, chunks): a prefix is cut up only as far as that fills the device."""
    tiles = sum(-(-len(group.rows) // limits.members_per_item) for group in groups)
    plans = []
    for group in groups:
        tokens = group.num_blocks * block_size
        most = max(limits.num_prefix_programs // (tiles * limits.num_kv_heads), 1)
        num_chunks = max(min(most, tokens // MIN_PREFIX_CHUNK), 1)
        size = -(-tokens // (num_chunks * TILE)) * TILE
        plans.append((group, size, -(-tokens // size)))
    return plans


def _prefix_items(
    plans: list[tuple[PrefixGroup, int, int]], slots: np.ndarray, block_size: int, members_per_item: int
) -> np.ndarray:
    items = []
    first_member = 0
    for group, size, num_chunks in plans:
        tokens, slot = group.num_blocks * block_size, int(slots[group.rows[0]])
        for at in range(0, len(group.rows), members_per_item):
            count = min(members_per_item, len(group.rows) - at)
            items += [
                (slot, first_member + at, count, chunk * size, min((chunk + 1) * size, tokens), chunk, 0, 0)
                for chunk in range(num_chunks)
            ]
        first_member += len(group.rows)
    return np.array(items, np.int32).reshape(-1, ITEM_FIELDS)
