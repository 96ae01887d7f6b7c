"""From a plan to flat arrays: slot arithmetic, positions, block tables. Pure numpy."""

from dataclasses import dataclass

import numpy as np

from kernels.attention_work import ITEM_FIELDS
from nanovllm.engine.plan import Plan


class BlockTables:
    """The host's copy of every slot's block table, kept up to date from the plans' new entries."""

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self.array = np.zeros((max_num_seqs, max_blocks), np.int32)
        """[slots, columns]"""

    def update(self, plan: Plan) -> None:
        """Apply a plan's new entries; must be called once for each plan, in order."""
        self.array[plan.table_slots, plan.table_columns] = plan.table_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A plan's tokens one after the other, decodes first, then padding up to a multiple."""

    num_tokens: int
    """Without padding."""
    input_ids: np.ndarray
    """int64 [padded tokens]; of decode rows, whose token is on the device, -1 - slot; 0 for padding."""
    positions: np.ndarray
    """int64 [padded tokens]"""
    slot_mapping: np.ndarray
    """int64 [padded tokens]; block * block size + offset, -1 for padding."""
    context_lens: np.ndarray
    """int32 [rows]; tokens whose KV is there after the step."""
    width: int
    """Columns of the block tables that cover the longest row."""
    logits_index: np.ndarray
    """int64 [padded rows that sample]; where a sampling row's last token stands; padding repeats the first."""
    num_sampled: int
    sample_slots: np.ndarray
    """int32 [rows that sample]"""
    sample_positions: np.ndarray
    """int32 [rows that sample]; place in its sequence of the token that is sampled."""


def pack(plan: Plan, tables: BlockTables, block_size: int, multiple: int) -> PackedBatch:
    """Arrays for one step; packed tokens and sampled rows are padded to a multiple of `multiple`."""
    ends = plan.starts + plan.num_tokens
    num_tokens, last, row_of_token, positions_of = _place(plan)
    padded = _round_up(num_tokens, multiple)
    positions = np.zeros(padded, np.int64)
    positions[:num_tokens] = positions_of

    input_ids = np.zeros(padded, np.int64)
    input_ids[: plan.num_decodes] = -1 - plan.slots[: plan.num_decodes]
    input_ids[plan.num_decodes : num_tokens] = plan.prefill_token_ids

    slot_mapping = np.full(padded, -1, np.int64)
    slot_of_token = plan.slots[row_of_token]
    slot_mapping[:num_tokens] = kv_slots(tables.array, slot_of_token, positions[:num_tokens], block_size)

    sampling = np.flatnonzero(plan.samples)
    logits_index = np.zeros(_round_up(len(sampling), multiple), np.int64)
    logits_index[: len(sampling)] = last[sampling]
    return PackedBatch(
        num_tokens=num_tokens,
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        context_lens=ends,
        width=-(-int(ends.max()) // block_size),
        logits_index=logits_index,
        num_sampled=len(sampling),
        sample_slots=plan.slots[sampling],
        sample_positions=ends[sampling],
    )


def _place(plan: Plan) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Number of packed tokens, where each row's last one stands, and each token's row and position."""
    rows = np.arange(plan.num_rows)
    if plan.num_decodes == plan.num_rows:
        return plan.num_rows, rows, rows, plan.starts
    counts = plan.num_tokens.astype(np.int64)
    last = np.cumsum(counts) - 1
    row_of_token = np.repeat(rows, counts)
    positions = np.arange(len(row_of_token)) + (plan.starts + counts - last - 1)[row_of_token]
    return len(row_of_token), last, row_of_token, positions


def split_evenly(context_lens: np.ndarray, half: int) -> int:
    """The row that begins the second half of a decode step: at most `half` rows on either side, and about as many
    tokens of context."""
    rows = len(context_lens)
    tokens = np.cumsum(context_lens)
    split = int(np.searchsorted(tokens, tokens[-1] / 2)) + 1
    return min(max(split, rows - half, 1), half, rows - 1)


def apart(array: np.ndarray, split: int, half: int, fill: int) -> np.ndarray:
    """`array` [rows] in halves: its first `split` values at the beginning, the others from `half` on."""
    spread = np.full(half + len(array) - split, fill, array.dtype)
    spread[:split], spread[half:] = array[:split], array[split:]
    return spread


def kv_slots(block_tables: np.ndarray, rows: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """int64 [tokens]: where the token at `positions` of table row `rows` keeps its KV."""
    blocks = block_tables[rows, positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


def prefill_items(counts: np.ndarray, starts: np.ndarray, slots: np.ndarray, tokens_per_item: int) -> np.ndarray:
    """int32 [items, ITEM_FIELDS] of kernels/paged_prefill_attention.py for rows of `counts` [rows] tokens.

    `starts` are the positions of their first tokens. Items with the most keys come first, so that the launch ends on
    short ones.
    """
    tiles = -(-counts // tokens_per_item)
    rows = np.repeat(np.arange(len(counts)), tiles)
    offset = (np.arange(len(rows)) - (np.cumsum(tiles) - tiles)[rows]) * tokens_per_item
    items = np.zeros((len(rows), ITEM_FIELDS), np.int32)
    items[:, 0] = (np.cumsum(counts) - counts)[rows] + offset
    items[:, 1] = np.minimum(counts[rows] - offset, tokens_per_item)
    items[:, 2] = slots[rows]
    items[:, 3] = starts[rows] + offset
    return items[np.argsort(-(items[:, 3] + items[:, 1]), kind="stable")]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
