"""A decode step's work list, read as kernels/attention_work.py says: every row meets each of its tokens once."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from kernels.attention_work import ITEM_FIELDS
from nanovllm.runner.decode_work import (
    LONGEST_SHARE,
    LONGEST_SHARE_BESIDE,
    MAX_CHUNK,
    MIN_CHUNK,
    TILE,
    WorkArrays,
    WorkLimits,
    share_out,
)
from nanovllm.runner.shared_prefixes import MIN_MEMBERS, PrefixGroup

Piece = tuple[int, int]
"""Tokens [first, end)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    contexts: np.ndarray
    groups: list[PrefixGroup]
    block_size: int
    limits: WorkLimits
    slots: np.ndarray
    work: WorkArrays

    def prefix_tokens(self) -> np.ndarray:
        """[rows]"""
        tokens = np.zeros(len(self.contexts), np.int64)
        for group in self.groups:
            tokens[group.rows] = group.num_blocks * self.block_size
        return tokens


def case(contexts: np.ndarray, groups: list[PrefixGroup], block_size: int, limits: WorkLimits, seed: int = 0) -> Case:
    slots = np.random.default_rng(seed).permutation(len(contexts) + 9)[: len(contexts)].astype(np.int32)
    work = share_out(slots, contexts.astype(np.int32), groups, block_size, limits)
    return Case(contexts=contexts, groups=groups, block_size=block_size, limits=limits, slots=slots, work=work)


def random_case(seed: int, *, with_groups: bool) -> Case:
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 2, 5, 16, 100, 1024, int(rng.integers(1, 1025))]))
    longest = int(rng.choice([16, 300, 2000, 20_000]))
    contexts = rng.integers(int(rng.choice([1, longest // 2, longest])), longest + 1, rows)
    block_size = int(rng.choice([1, 16, 48, 256]))
    limits = WorkLimits(
        num_kv_heads=int(rng.integers(1, 9)),
        num_programs=int(rng.choice([1, 8, 264, 792])),
        num_prefix_programs=int(rng.choice([1, 8, 132])),
        members_per_item=int(rng.choice([1, 3, 16, 64])),
        beside=not with_groups and bool(rng.integers(2)),
    )
    groups = list(random_groups(rng, contexts, block_size)) if with_groups else []
    return case(contexts, groups, block_size, limits, seed)


def random_groups(rng: np.random.Generator, contexts: np.ndarray, block_size: int) -> Iterator[PrefixGroup]:
    """Disjoint, with some rows left over; a row keeps at least one token of its own."""
    full = (contexts - 1) // block_size
    rows = rng.permutation(np.flatnonzero(full > 0))
    while len(rows) >= MIN_MEMBERS and rng.random() < 0.8:
        count = int(rng.integers(MIN_MEMBERS, len(rows) + 1))
        members, rows = np.sort(rows[:count]), rows[count:]
        yield PrefixGroup(members, int(rng.integers(1, full[members].min() + 1)))


def limits(*, kv_heads: int, programs: int = 792, prefix_programs: int = 132, members_per_item: int = 64) -> WorkLimits:
    return WorkLimits(
        num_kv_heads=kv_heads,
        num_programs=programs,
        num_prefix_programs=prefix_programs,
        members_per_item=members_per_item,
    )


def one_group(rows: int, context: int, prefix_blocks: int, shape: WorkLimits) -> Case:
    return case(np.full(rows, context), [PrefixGroup(np.arange(rows), prefix_blocks)], 16, shape)


EXTREMES: dict[str, Callable[[], Case]] = {
    "as many tokens as can be": lambda: case(np.full(1024, 20_000), [], 16, limits(kv_heads=8)),
    "long rows that are not quite whole chunks": lambda: case(np.full(1024, 19_969), [], 16, limits(kv_heads=1)),
    "a prefix cut into as many chunks as can be": lambda: one_group(64, 20_000, 1249, limits(kv_heads=1)),
    "four rows, many prefix chunks": lambda: one_group(4, 20_000, 1249, limits(kv_heads=1, members_per_item=4)),
    "more members than prefix programs": lambda: one_group(
        1024, 4097, 256, limits(kv_heads=8, prefix_programs=1, members_per_item=1)
    ),
    "long own parts behind a prefix": lambda: one_group(100, 20_000, 400, limits(kv_heads=2)),
    "a lone token": lambda: case(np.array([1]), [], 16, limits(kv_heads=8)),
}
RANDOM: dict[str, Callable[[], Case]] = {
    f"seed {seed}, {'with' if with_groups else 'without'} groups": functools.partial(
        random_case, seed, with_groups=with_groups
    )
    for with_groups in (False, True)
    for seed in range(40)
}


@pytest.fixture(scope="module", params=[*RANDOM, *EXTREMES])
def any_case(request: pytest.FixtureRequest) -> Case:
    return (RANDOM | EXTREMES)[request.param]()


def prefix_partials(of: Case) -> dict[int, list[tuple[int, Piece]]]:
    """Of each row, the partials of its shared prefix and their tokens, in the order of the chunks."""
    work = of.work
    partials: dict[int, list[tuple[int, Piece]]] = {}
    for _, first_member, num_members, first, end, chunk in work.prefix_items[:, :6].tolist():
        for member in range(first_member, first_member + num_members):
            partial = int(work.member_partials[member]) + chunk
            partials.setdefault(int(work.members[member]), []).append((partial, (first, end)))
    return {row: sorted(pieces) for row, pieces in partials.items()}


def written_partials(of: Case) -> dict[int, tuple[int, Piece]]:
    """(row, tokens) by partial."""
    written = {partial: (row, piece) for row, pieces in prefix_partials(of).items() for partial, piece in pieces}
    for row, _, first, end, partial in of.work.items[:, :5].tolist():
        if partial >= 0:
            written[partial] = row, (first, end)
    return written


def assert_tiled(pieces: list[Piece], begin: int, end: int, story: str) -> None:
    """In order, without gap or overlap, none empty."""
    pieces = sorted(pieces)
    assert all(first < last for first, last in pieces), f"{story}: an empty piece in {pieces}"
    joints = [begin, *(last for _, last in pieces)], [*(first for first, _ in pieces), end]
    assert joints[0] == joints[1], f"{story}: {pieces} are not [{begin}, {end})"


def test_items_cover_each_rows_own_tokens_once(any_case: Case) -> None:
    pieces: dict[int, list[Piece]] = {}
    for row, slot, first, end in any_case.work.items[:, :4].tolist():
        assert slot == any_case.slots[row]
        pieces.setdefault(row, []).append((first, end))
    starts = any_case.prefix_tokens()
    assert sorted(pieces) == list(range(len(any_case.contexts)))
    for row, of_row in pieces.items():
        assert_tiled(of_row, int(starts[row]), int(any_case.contexts[row]), f"row {row}")


def test_chunks_are_equal_and_whole_tiles_but_for_a_rows_last(any_case: Case) -> None:
    rows, first, end = any_case.work.items[:, [0, 2, 3]].T
    order = np.lexsort((first, rows))
    rows, length = rows[order], (end - first)[order]
    followed = np.append(rows[1:] == rows[:-1], False)
    assert (length[followed] % TILE == 0).all()
    assert (length[1:][followed[:-1]] <= length[:-1][followed[:-1]]).all(), "a chunk is longer than the one before it"
    assert (length[1:][followed[1:] & followed[:-1]] == length[:-1][followed[1:] & followed[:-1]]).all()


def test_the_longest_items_come_first(any_case: Case) -> None:
    length = any_case.work.items[:, 3] - any_case.work.items[:, 2]
    assert (np.diff(length) <= 0).all()


def test_no_item_is_longer_than_a_chunk_may_be(any_case: Case) -> None:
    """Longer ones only where there would be more than EXTRA_ITEMS of MAX_CHUNK, or no more than a program's share."""
    own = int((any_case.contexts - any_case.prefix_tokens()).sum())
    longest = int((any_case.work.items[:, 3] - any_case.work.items[:, 2]).max())
    share = own * any_case.limits.num_kv_heads / any_case.limits.num_programs
    whole = LONGEST_SHARE_BESIDE if any_case.limits.beside else LONGEST_SHARE
    assert longest <= max(MAX_CHUNK, own / any_case.limits.extra_items + TILE, share * whole)


@pytest.mark.parametrize(
    ("rows", "is_cut", "is_cut_beside"),
    [
        (1024, False, False),
        (256, False, False),
        (80, False, False),
        (50, True, False),
        (16, True, True),
        (1, True, True),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_rows_are_cut_only_where_they_share_out_badly(
    rows: int, is_cut: bool, is_cut_beside: bool, beside: bool
) -> None:
    shape = replace(limits(kv_heads=8, programs=264), beside=beside)
    of = case(np.full(rows, 5000), [], 16, shape)
    assert (len(of.work.merges) > 0) == (is_cut_beside if beside else is_cut)
    lopsided = case(np.array([*[100] * (rows - 1), 20_000]), [], 16, shape)
    assert len(lopsided.work.merges) > 0, "one row would keep a program busy long after all others"


def test_the_work_fits_what_the_device_has_room_for(any_case: Case) -> None:
    work, rows = any_case.work, len(any_case.contexts)
    assert len(work.items) <= any_case.limits.items(rows)
    assert len(work.prefix_items) <= any_case.limits.prefix_items(rows)
    assert len(work.merges) <= rows
    assert len(work.members) == len(work.member_partials) <= rows
    assert max(written_partials(any_case), default=0) < any_case.limits.partials(rows)
    for array in (work.items, work.merges, work.prefix_items, work.members, work.member_partials):
        assert array.dtype == np.int32
    assert work.items.shape[1] == work.prefix_items.shape[1] == ITEM_FIELDS


def test_no_two_results_have_the_same_partial(any_case: Case) -> None:
    own = [partial for partial in any_case.work.items[:, 4].tolist() if partial >= 0]
    shared = [partial for pieces in prefix_partials(any_case).values() for partial, _ in pieces]
    twice = [partial for partial, count in Counter(own + shared).items() if count > 1]
    assert not twice, f"partials {twice[:5]} are written twice"
    assert min(own + shared, default=0) >= 0


def test_a_row_with_one_item_goes_on_from_its_prefix_and_others_are_merged(any_case: Case) -> None:
    work, of_prefix = any_case.work, prefix_partials(any_case)
    num_items = Counter(work.items[:, 0].tolist())
    merges = {row: (first, count) for row, first, count, _ in work.merges.tolist()}
    assert len(merges) == len(work.merges), "a row is merged twice"
    assert merges.keys() == {row for row, count in num_items.items() if count > 1}
    own: dict[int, list[int]] = {}
    for row, partial, goes_on_from, goes_on_for in work.items[:, [0, 4, 5, 6]].tolist():
        prefix = [partial for partial, _ in of_prefix.get(row, [])]
        if num_items[row] == 1:
            assert partial == -1
            assert list(range(goes_on_from, goes_on_from + goes_on_for)) == prefix
        else:
            own.setdefault(row, []).append(partial)
            assert goes_on_for == 0, f"row {row} is merged, and its items count the prefix as well"
    for row, (first, count) in merges.items():
        prefix = [partial for partial, _ in of_prefix.get(row, [])]
        assert list(range(first, first + count)) == prefix + sorted(own[row])


def test_every_row_reads_each_of_its_tokens_once(any_case: Case) -> None:
    """What the other tests say of the parts, of the whole: an output follows its partials to all its tokens."""
    written = written_partials(any_case)
    read: dict[int, list[Piece]] = {}

    def join(row: int, first: int, count: int) -> None:
        for partial in range(first, first + count):
            of_row, piece = written[partial]
            assert of_row == row
            read.setdefault(row, []).append(piece)

    for row, _, first, end, partial, goes_on_from, goes_on_for in any_case.work.items[:, :7].tolist():
        if partial < 0:
            read.setdefault(row, []).append((first, end))
            join(row, goes_on_from, goes_on_for)
    for row, first, count, _ in any_case.work.merges.tolist():
        join(row, first, count)
    assert sorted(read) == list(range(len(any_case.contexts)))
    for row, pieces in read.items():
        assert_tiled(pieces, 0, int(any_case.contexts[row]), f"row {row}")


def test_members_are_the_groups_rows_group_by_group(any_case: Case) -> None:
    work = any_case.work
    assert work.members.tolist() == [row for group in any_case.groups for row in group.rows.tolist()]
    of_prefix = prefix_partials(any_case)
    assert of_prefix.keys() == set(work.members.tolist())
    for row, first in zip(work.members.tolist(), work.member_partials.tolist(), strict=True):
        partials = [partial for partial, _ in of_prefix[row]]
        assert partials == list(range(first, first + len(partials)))


def test_prefix_items_cover_a_groups_prefix_once_for_each_member(any_case: Case) -> None:
    group_of = {row: group for group in any_case.groups for row in group.rows.tolist()}
    for slot, first_member, count, first, end in any_case.work.prefix_items[:, :5].tolist():
        members = any_case.work.members[first_member : first_member + count].tolist()
        assert 1 <= len(members) == count <= any_case.limits.members_per_item
        group = group_of[members[0]]
        assert {id(group_of[row]) for row in members} == {id(group)}, "an item has members of two groups"
        assert slot in any_case.slots[group.rows], "an item reads a table that does not begin with its prefix"
        assert (end - first) % TILE == 0 or end == group.num_blocks * any_case.block_size
    for row, pieces in prefix_partials(any_case).items():
        tokens = group_of[row].num_blocks * any_case.block_size
        assert_tiled([piece for _, piece in pieces], 0, tokens, f"the prefix of row {row}")


def test_without_groups_there_is_no_prefix_work() -> None:
    work = random_case(3, with_groups=False).work
    assert len(work.prefix_items) == len(work.members) == len(work.member_partials) == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("programs", [1, 8, 132, 264, 792])
def test_a_lone_row_is_cut_into_enough_pieces_to_fill_the_programs(kv_heads: int, programs: int) -> None:
    """Or into pieces as short as they may be."""
    work = case(np.array([8192]), [], 16, limits(kv_heads=kv_heads, programs=programs)).work
    assert len(work.items) * kv_heads >= min(programs, 8192 // MIN_CHUNK * kv_heads)
    assert len(work.items) <= 8192 // MIN_CHUNK


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_lone_groups_prefix_is_cut_up_to_fill_the_programs_and_no_further(kv_heads: int) -> None:
    shape = limits(kv_heads=kv_heads, prefix_programs=32, members_per_item=8)
    work = one_group(16, 20_000, 1249, shape).work
    assert 32 // 2 < len(work.prefix_items) * kv_heads <= 32
