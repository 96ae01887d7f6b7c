"""Slot arithmetic and packing, on plans written by hand."""

import numpy as np
import pytest

from nanovllm.engine.plan import Plan
from nanovllm.runner.batch import BlockTables, PackedBatch, apart, kv_slots, pack, split_evenly


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def plan(
    *, starts: list[int], counts: list[int], samples: list[bool], num_decodes: int, ids: list[int], tables: dict
) -> Plan:
    entries = [(slot, column, block) for slot, blocks in tables.items() for column, block in enumerate(blocks)]
    columns = np.array(entries, np.int32).reshape(-1, 3).T
    return Plan(
        step=0,
        seq_ids=np.arange(len(starts)),
        slots=np.arange(len(starts), dtype=np.int32),
        starts=np.array(starts, np.int32),
        num_tokens=np.array(counts, np.int32),
        samples=np.array(samples),
        num_decodes=num_decodes,
        prefill_token_ids=np.array(ids, np.int32),
        admissions=(),
        table_slots=columns[0],
        table_columns=columns[1],
        table_blocks=columns[2],
    )


MIXED = plan(
    starts=[5, 3, 0, 4],
    counts=[1, 1, 3, 2],
    samples=[True, True, False, True],
    num_decodes=2,
    ids=[70, 71, 72, 80, 81],
    tables={0: [9, 4], 1: [2], 2: [7], 3: [5, 6]},
)


def packed(step: Plan, block_size: int = 4, multiple: int = 4) -> PackedBatch:
    tables = BlockTables(8, 16)
    tables.update(step)
    return pack(step, tables, block_size, multiple)


def test_a_mixed_batch_packs_decodes_first_and_pads_at_the_end() -> None:
    batch = packed(MIXED)
    assert batch.num_tokens == 7
    assert batch.input_ids.tolist() == [-1, -2, 70, 71, 72, 80, 81, 0]
    assert batch.positions.tolist() == [5, 3, 0, 1, 2, 4, 5, 0]
    assert batch.slot_mapping.tolist() == [4 * 4 + 1, 2 * 4 + 3, 28, 29, 30, 6 * 4, 6 * 4 + 1, -1]
    assert batch.context_lens.tolist() == [6, 4, 3, 6]
    assert batch.width == 2


def test_logits_are_taken_at_the_last_token_of_rows_that_sample() -> None:
    batch = packed(MIXED)
    assert batch.num_sampled == 3
    assert batch.logits_index.tolist() == [0, 1, 6, 0]  # padded to the multiple
    assert batch.sample_slots.tolist() == [0, 1, 3]
    assert batch.sample_positions.tolist() == [6, 4, 6]


def test_a_decode_batch_has_one_token_a_row() -> None:
    step = plan(starts=[5, 3], counts=[1, 1], samples=[True] * 2, num_decodes=2, ids=[], tables={0: [9, 4], 1: [2]})
    batch = packed(step)
    assert batch.positions.tolist() == [5, 3, 0, 0]
    assert batch.logits_index.tolist() == [0, 1, 0, 0]
    assert batch.slot_mapping.tolist() == [17, 11, -1, -1]


def test_a_step_that_samples_nothing_has_no_logits() -> None:
    step = plan(starts=[0], counts=[3], samples=[False], num_decodes=0, ids=[1, 2, 3], tables={0: [1]})
    batch = packed(step)
    assert batch.num_sampled == len(batch.logits_index) == 0


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_slot_is_block_times_size_plus_offset(block_size: int) -> None:
    rng = np.random.default_rng(block_size)
    tables = rng.permutation(200).reshape(4, 50).astype(np.int32)
    rows, positions = rng.integers(0, 4, 100), rng.integers(0, 50 * block_size, 100)
    slots = kv_slots(tables, rows, positions, block_size)
    for row, position, slot in zip(rows, positions, slots, strict=True):
        assert divmod(int(slot), block_size) == (tables[row, position // block_size], position % block_size)


def test_tables_keep_what_earlier_plans_entered() -> None:
    tables = BlockTables(2, 4)
    tables.update(plan(starts=[0], counts=[1], samples=[True], num_decodes=0, ids=[1], tables={1: [8, 3]}))
    tables.update(plan(starts=[0], counts=[1], samples=[True], num_decodes=0, ids=[1], tables={0: [5]}))
    assert tables.array[:, :2].tolist() == [[5, 0], [8, 3]]


@pytest.mark.parametrize("seed", range(30))
def test_halves_fit_and_are_as_even_as_that_allows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    half = int(rng.integers(1, 65))
    lens = rng.integers(1, int(rng.choice([2, 100, 5000])), int(rng.integers(2, 2 * half + 1)) if half > 1 else 2)
    split = split_evenly(lens, half)
    allowed = range(max(len(lens) - half, 1), min(half, len(lens) - 1) + 1)
    assert split in allowed

    def unevenness(place: int) -> int:
        return abs(int(lens[:place].sum()) - int(lens[place:].sum()))

    assert unevenness(split) <= min(map(unevenness, allowed)) + 2 * lens.max()


def test_halves_stand_apart_with_padding_behind_each() -> None:
    spread = apart(np.array([5, 6, 7], np.int32), split=2, half=4, fill=-1)
    assert spread.tolist() == [5, 6, -1, -1, 7]
    assert spread.dtype == np.int32
    assert apart(np.array([5, 6]), split=1, half=1, fill=-1).tolist() == [5, 6]
