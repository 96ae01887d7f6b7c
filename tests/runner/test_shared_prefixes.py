"""Groups of rows that share their leading blocks, against every choice that a small tree of blocks leaves."""

import numpy as np
import pytest

from nanovllm.runner.shared_prefixes import MIN_MEMBERS, MIN_SAVED_TOKENS, PrefixGroup, find_groups


def random_tables(rng: np.random.Generator, rows: int, width: int, num_choices: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables that often agree, also behind what counts of them and behind columns where they differ."""
    tables = rng.integers(0, num_choices, (rows, width)).astype(np.int32)
    copied = rng.random(rows) < 0.5
    tables[copied, : width // 2] = tables[0, : width // 2]
    return tables, rng.integers(0, width + 1, rows) if rng.random() < 0.5 else np.full(rows, width)


def saved(groups: list[PrefixGroup], block_size: int) -> int:
    return sum((len(group.rows) - 1) * group.num_blocks * block_size for group in groups)


def most_saved(tables: np.ndarray, full: np.ndarray, block_size: int) -> int:
    """The most that disjoint groups save of which each holds all rows that share its prefix, by trying all."""
    rows_of: dict[tuple[int, ...], set[int]] = {}
    for row, (table, length) in enumerate(zip(tables.tolist(), full.tolist(), strict=True)):
        for depth in range(1, length + 1):
            rows_of.setdefault(tuple(table[:depth]), set()).add(row)
    groups = [(rows, (len(rows) - 1) * len(prefix) * block_size) for prefix, rows in rows_of.items()]
    groups = [(rows, value) for rows, value in groups if len(rows) >= MIN_MEMBERS and value >= MIN_SAVED_TOKENS]

    def best(choices: list[tuple[set[int], int]]) -> int:
        if not choices:
            return 0
        (rows, value), *others = choices
        return max(best(others), value + best([choice for choice in others if not choice[0] & rows]))

    return best(groups)


def assert_sound(groups: list[PrefixGroup], tables: np.ndarray, full: np.ndarray, block_size: int) -> None:
    rows = [row for group in groups for row in group.rows.tolist()]
    assert len(rows) == len(set(rows)), "a row is in two groups"
    for group in groups:
        assert len(group.rows) >= MIN_MEMBERS
        assert 1 <= group.num_blocks <= full[group.rows].min(), "a prefix reaches into a block that is not full"
        shared = tables[group.rows, : group.num_blocks]
        assert (shared == shared[0]).all(), "members have different blocks"
        assert saved([group], block_size) >= MIN_SAVED_TOKENS


@pytest.mark.parametrize("seed", range(300))
def test_groups_are_sound_and_save_as_much_as_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(1, 17)), int(rng.integers(1, 6))
    tables, full = random_tables(rng, rows, width, int(rng.choice([1, 2, 3])))
    block_size = int(rng.choice([100, 256, 700, 1366, 4096]))

    groups = find_groups(tables, full, block_size)

    assert_sound(groups, tables, full, block_size)
    assert saved(groups, block_size) == most_saved(tables, full, block_size)


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_large_batches_are_sound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables, full = random_tables(rng, int(rng.integers(100, 1025)), int(rng.integers(2, 133)), 2)
    block_size = int(rng.choice([16, 64, 256]))
    groups = find_groups(tables, full, block_size)
    assert groups
    assert_sound(groups, tables, full, block_size)


def nested(num_groups: int, members: int, head: int, deeper: int) -> np.ndarray:
    """Tables of groups that share `head` blocks with all and `deeper` more among themselves, then one of their own."""
    rows = np.arange(num_groups * members)[:, None]
    common = np.broadcast_to(np.arange(head), (len(rows), head))
    among = head + rows // members * deeper + np.arange(deeper)
    return np.concatenate([common, among, 10_000 + rows], axis=1).astype(np.int32)


@pytest.mark.parametrize(
    ("num_groups", "members", "head", "deeper", "expected"),
    [
        (3, 4, 16, 256, [272] * 3),  # 3 * 3 * 272 against 11 * 16
        (3, 4, 256, 16, [256]),  # 11 * 256 against 3 * 3 * 272
        (50, 3, 4, 1000, [4]),  # too few share the deeper part
        (40, 4, 0, 256, [256] * 40),
    ],
)
def test_of_nested_prefixes_those_are_taken_that_save_more(
    num_groups: int, members: int, head: int, deeper: int, expected: list[int]
) -> None:
    tables = nested(num_groups, members, head, deeper)
    tables = tables[np.random.default_rng(0).permutation(len(tables))]
    groups = find_groups(tables, np.full(len(tables), tables.shape[1]), 16)
    assert [group.num_blocks for group in groups] == expected
    assert sum(len(group.rows) for group in groups) == num_groups * members


def test_rows_that_share_nothing_or_only_later_blocks_have_no_group() -> None:
    tables = np.arange(64 * 40, dtype=np.int32).reshape(64, 40)
    full = np.full(64, 40)
    assert find_groups(tables, full, 256) == []
    tables[:, 1:] = tables[0, 1:]
    assert find_groups(tables, full, 256) == []


@pytest.mark.parametrize("block_size", [16, 256])
def test_a_group_forms_just_where_it_saves_enough(block_size: int) -> None:
    tables = np.tile(np.arange(MIN_SAVED_TOKENS, dtype=np.int32), (MIN_MEMBERS + 1, 1))
    enough = MIN_SAVED_TOKENS // (MIN_MEMBERS * block_size)
    assert find_groups(tables, np.full(len(tables), enough - 1), block_size) == []
    assert [g.num_blocks for g in find_groups(tables, np.full(len(tables), enough), block_size)] == [enough]


def test_fewer_rows_than_a_group_needs_have_none() -> None:
    tables = np.zeros((MIN_MEMBERS - 1, 100), np.int32)
    assert find_groups(tables, np.full(len(tables), 100), 4096) == []


def test_rows_of_which_each_ends_a_block_later_than_the_one_before() -> None:
    """As the turns of one long conversation do, each a row."""
    tables = np.tile(np.arange(1000, dtype=np.int32), (1000, 1))
    full = np.arange(1, 1001)
    groups = find_groups(tables, full, 16)
    assert_sound(groups, tables, full, 16)
