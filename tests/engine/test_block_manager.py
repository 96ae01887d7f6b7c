"""Blocks: who may take which, what stays reusable, and in which order it is given up."""

import numpy as np
import pytest

from nanovllm.engine.block_manager import CUT, ROOT, BlockManager, PublishRuns
from nanovllm.engine.event_log import REASON_CODES
from nanovllm.events import ALLOCATE, COMMIT, EVICT, FINISHED, FREE, HIT, PREEMPTED, RELEASE, BlockEvent
from tests.engine.ledger_check import chained_hash

SIZE = 2


def prompt(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int32)


def find(blocks: BlockManager, token_ids: np.ndarray, hashes: list[int] | None = None) -> list[int]:
    num_blocks = len(token_ids) // blocks.block_size
    return blocks.find_prefix(token_ids, [] if hashes is None else hashes, num_blocks).tolist()


def take(blocks: BlockManager, seq_id: int, count: int) -> list[int]:
    return blocks.allocate(np.full(count, seq_id)).tolist()


def hit(blocks: BlockManager, seq_id: int, table: list[int]) -> None:
    blocks.hit(seq_id, np.array(table, np.int32))


def give_back(blocks: BlockManager, seq_id: int, table: list[int], reason: str = FINISHED) -> int:
    owners, reasons = np.full(len(table), seq_id), np.full(len(table), REASON_CODES[reason])
    return blocks.free(owners, np.array(table[::-1], np.intp), reasons)


def num_unused(blocks: BlockManager, table: list[int]) -> int:
    return blocks.num_unused(np.array(table, np.int32))


def publish(
    blocks: BlockManager, seq_id: int, block: int, parent: int, prefix_hash: int, token_ids: np.ndarray
) -> int | None:
    """One block."""
    runs = runs_of((seq_id, parent, 1))
    (content,) = blocks.publish(runs, np.array([block]), [prefix_hash], token_ids.reshape(1, SIZE)).tolist()
    return None if content == CUT else content


def runs_of(*runs: tuple[int, int, int]) -> PublishRuns:
    return PublishRuns(*np.array(runs, np.int64).T)


def fill(blocks: BlockManager, seq_id: int, token_ids: np.ndarray) -> list[int]:
    """Take blocks for whole blocks of tokens and publish them all."""
    size = blocks.block_size
    hashes: list[int] = []
    blocks.extend_hashes(hashes, token_ids[: len(token_ids) // size * size].tobytes())
    table = blocks.allocate(np.full(len(hashes), seq_id))
    blocks.publish(
        runs_of((seq_id, ROOT, len(hashes))), table, hashes, token_ids[: len(hashes) * size].reshape(-1, size)
    )
    return table.tolist()


def evicted(blocks: BlockManager) -> list[int]:
    return [event.block_id for event in blocks.events if event.event == EVICT]


def test_every_block_is_handed_out_once_and_comes_back() -> None:
    blocks = BlockManager(4, SIZE)

    table = take(blocks, 1, 3) + take(blocks, 2, 1)

    assert sorted(table) == [0, 1, 2, 3]
    assert (blocks.num_free, blocks.num_used) == (0, 4)
    assert give_back(blocks, 1, table[:3], FINISHED) == 3
    assert (blocks.num_free, blocks.num_used) == (3, 1)
    blocks.check_integrity([table[3:]])


def test_asking_for_more_than_is_free_takes_nothing_and_says_how_much_there_is() -> None:
    """Never reached unless the scheduler has miscounted, so it must be fatal, named, and easy to look into."""
    blocks = BlockManager(2, SIZE)

    with pytest.raises(AssertionError, match=r"3.*2"):
        take(blocks, 1, 3)
    blocks.check_integrity([])


def test_a_published_prefix_is_found_again_as_far_as_it_goes() -> None:
    blocks = BlockManager(8, SIZE)
    table = fill(blocks, 1, prompt(1, 2, 3, 4, 5, 6))

    assert find(blocks, prompt(1, 2, 3, 4, 5, 6, 7, 8)) == table
    assert find(blocks, prompt(1, 2, 3, 4, 9, 9)) == table[:2]
    assert find(blocks, prompt(1, 2, 3)) == table[:1], "half a block is no hit"
    assert find(blocks, prompt(3, 4, 5, 6)) == [], "the same tokens behind another beginning are no hit"


def test_finding_takes_nothing() -> None:
    blocks = BlockManager(8, SIZE)
    table = fill(blocks, 1, prompt(1, 2))

    find(blocks, prompt(1, 2))

    blocks.check_integrity([table])


def test_a_hit_shares_a_used_block_and_revives_a_cached_one() -> None:
    blocks = BlockManager(4, SIZE)
    table = fill(blocks, 1, prompt(1, 2))

    hit(blocks, 2, table)
    blocks.check_integrity([table, table])
    assert blocks.num_used == 1
    assert give_back(blocks, 1, table, FINISHED) == 0, "another user is left"
    assert give_back(blocks, 2, table, FINISHED) == 1
    assert blocks.num_cached == 1
    assert num_unused(blocks, table) == 1

    hit(blocks, 3, table)
    assert (blocks.num_cached, blocks.num_used, num_unused(blocks, table)) == (0, 1, 0)
    blocks.check_integrity([table])


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(3, SIZE)
    cached = fill(blocks, 1, prompt(1, 2))
    give_back(blocks, 1, cached, FINISHED)

    table = take(blocks, 2, 2)

    assert not set(table) & set(cached)
    assert find(blocks, prompt(1, 2)) == cached


def test_the_prefix_used_longest_ago_is_evicted_first() -> None:
    blocks = BlockManager(3, SIZE)
    a, b, c = (fill(blocks, i, prompt(i, i))[0] for i in (1, 2, 3))
    for seq_id, block in ((2, b), (1, a), (3, c)):
        give_back(blocks, seq_id, [block], FINISHED)
    hit(blocks, 4, [b])
    give_back(blocks, 4, [b], FINISHED)

    take(blocks, 5, 3)

    assert evicted(blocks) == [a, c, b]


def test_a_prefix_is_evicted_from_its_end() -> None:
    """Otherwise its later blocks would be kept though nobody could reach them."""
    blocks = BlockManager(3, SIZE)
    table = fill(blocks, 1, prompt(1, 2, 3, 4, 5, 6))
    give_back(blocks, 1, table, FINISHED)

    take(blocks, 2, 1)
    assert find(blocks, prompt(1, 2, 3, 4, 5, 6)) == table[:2]
    take(blocks, 2, 1)
    assert find(blocks, prompt(1, 2, 3, 4, 5, 6)) == table[:1]


def test_an_evicted_prefix_is_not_found() -> None:
    blocks = BlockManager(1, SIZE)
    give_back(blocks, 1, fill(blocks, 1, prompt(1, 2)), FINISHED)

    table = fill(blocks, 2, prompt(3, 4))

    assert find(blocks, prompt(1, 2)) == []
    assert find(blocks, prompt(3, 4)) == table
    blocks.check_integrity([table])


def test_of_two_equal_blocks_the_first_stays_in_the_index() -> None:
    """As when identical prompts are computed in one step."""
    blocks = BlockManager(4, SIZE)
    first = fill(blocks, 1, prompt(1, 2, 3, 4))
    second = fill(blocks, 2, prompt(1, 2, 3, 4))

    assert find(blocks, prompt(1, 2, 3, 4)) == first
    assert [e.seq_id for e in blocks.events if e.event == COMMIT] == [1, 1]
    give_back(blocks, 2, second, FINISHED)
    assert (blocks.num_cached, blocks.num_free) == (0, 2), "a duplicate is worth nothing when it is free"


def test_equal_blocks_that_are_published_in_one_call_are_published_once() -> None:
    """As when identical prompts are computed in one step; what only one of them has is published behind it."""
    blocks = BlockManager(8, SIZE)
    first, second = prompt(1, 2, 3, 4), prompt(1, 2, 3, 4, 5, 6)
    hashes: list[int] = []
    blocks.extend_hashes(hashes, second.tobytes())
    table = blocks.allocate(np.full(2, 1)), blocks.allocate(np.full(3, 2))

    contents = blocks.publish(
        runs_of((1, ROOT, 2), (2, ROOT, 3)),
        np.concatenate(table),
        hashes[:2] + hashes,
        np.concatenate([first, second]).reshape(-1, SIZE),
    )

    assert contents.tolist() == [blocks.content_of(table[0][1]), blocks.content_of(table[1][2])]
    assert [(e.seq_id, e.block_id) for e in blocks.events if e.event == COMMIT] == [(1, 0), (1, 1), (2, 4)]
    assert find(blocks, second) == [0, 1, 4]
    blocks.check_integrity([part.tolist() for part in table])


def test_a_prefix_is_not_found_a_second_time_when_a_block_of_it_was_evicted_in_between() -> None:
    blocks = BlockManager(3, SIZE)
    table = fill(blocks, 1, prompt(1, 2, 3, 4))
    give_back(blocks, 1, table)
    assert find(blocks, prompt(1, 2, 3, 4)) == table
    assert find(blocks, prompt(1, 2, 3, 4)) == table

    take(blocks, 2, 2)

    assert find(blocks, prompt(1, 2, 3, 4)) == table[:1]


def test_two_contents_with_one_hash_are_told_apart() -> None:
    blocks = BlockManager(4, SIZE)
    one, other = prompt(1, 2), prompt(3, 4)
    a, b = take(blocks, 1, 2)
    assert publish(blocks, 1, a, ROOT, 5, one) is not None

    assert publish(blocks, 1, b, ROOT, 5, other) is None, "the chain ends where hashes collide"
    assert find(blocks, prompt(1, 2), [5]) == [a]
    assert find(blocks, prompt(3, 4), [5]) == []
    blocks.check_integrity([[a, b]])


def test_equal_tokens_and_hash_behind_another_parent_are_no_hit() -> None:
    blocks = BlockManager(4, SIZE)
    a, b, c = take(blocks, 1, 3)
    first = publish(blocks, 1, a, ROOT, 5, prompt(1, 2))
    assert first is not None
    publish(blocks, 1, b, first, 6, prompt(9, 9))
    publish(blocks, 1, c, ROOT, 7, prompt(3, 4))

    assert find(blocks, prompt(1, 2, 9, 9), [5, 6]) == [a, b]
    assert find(blocks, prompt(3, 4, 9, 9), [7, 6]) == [c]


def test_what_followed_an_evicted_block_does_not_follow_the_next_content_of_that_block() -> None:
    """Content numbers are never given out again, even though block ids are."""
    blocks = BlockManager(2, SIZE)
    parent, child = take(blocks, 1, 2)
    content = publish(blocks, 1, parent, ROOT, 5, prompt(1, 2))
    assert content is not None
    publish(blocks, 1, child, content, 6, prompt(9, 9))
    give_back(blocks, 1, [parent], FINISHED)

    assert take(blocks, 2, 1) == [parent]
    publish(blocks, 2, parent, ROOT, 7, prompt(3, 4))

    assert find(blocks, prompt(3, 4, 9, 9), [7, 6]) == [parent]


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_a_hash_covers_the_whole_prefix(block_size: int) -> None:
    blocks = BlockManager(4, block_size)
    token_ids = np.arange(3 * block_size, dtype=np.int32)
    hashes: list[int] = []

    blocks.find_prefix(token_ids, hashes, 1)
    blocks.find_prefix(token_ids, hashes, 3)

    assert hashes == [chained_hash(list(range(n * block_size)), block_size) for n in (1, 2, 3)]


@pytest.mark.parametrize("num_common", [0, 1, 3, 4, 7, 8, 11, 12])
def test_the_hashes_of_a_prompt_do_not_depend_on_the_prompt_before(num_common: int) -> None:
    blocks = BlockManager(4, 4)
    for first_id in (100, 200):
        token_ids = np.concatenate([np.arange(num_common), np.arange(first_id, first_id + 13 - num_common)])
        hashes: list[int] = []

        blocks.find_prefix(token_ids.astype(np.int32), hashes, 3)

        assert hashes == [chained_hash(token_ids.tolist()[:n], 4) for n in (4, 8, 12)]


def test_nothing_is_found_with_prefix_caching_off() -> None:
    blocks = BlockManager(4, SIZE, prefix_caching=False)
    fill(blocks, 1, prompt(1, 2))

    assert find(blocks, prompt(1, 2)) == []


def test_events_tell_what_happened_with_the_state_after_it() -> None:
    blocks = BlockManager(2, SIZE)
    (block,) = fill(blocks, 1, prompt(1, 2))
    hit(blocks, 2, [block])
    give_back(blocks, 1, [block], PREEMPTED)
    give_back(blocks, 2, [block], FINISHED)
    take(blocks, 3, 2)
    digest = chained_hash([1, 2], SIZE)

    assert list(blocks.events) == [
        BlockEvent(ALLOCATE, 0, 1, None, 1, None, 1),
        BlockEvent(COMMIT, 0, 1, None, 1, digest, 1),
        BlockEvent(HIT, 0, 2, None, 2, digest, 1),
        BlockEvent(RELEASE, 0, 1, PREEMPTED, 1, digest, 1),
        BlockEvent(FREE, 0, 2, FINISHED, 0, digest, 2),
        BlockEvent(ALLOCATE, 1, 3, None, 1, None, 1),
        BlockEvent(EVICT, 0, 3, None, 0, digest, 1),
        BlockEvent(ALLOCATE, 0, 3, None, 1, None, 0),
    ]


@pytest.mark.parametrize("again", [[0], [0, 0]], ids=["later", "twice at once"])
def test_freeing_a_block_twice_is_an_error(again: list[int]) -> None:
    blocks = BlockManager(2, SIZE)
    table = take(blocks, 1, 1)
    assert table == [0]
    if len(again) == 1:
        give_back(blocks, 1, table, FINISHED)

    with pytest.raises(AssertionError, match="block 0 freed more often"):
        give_back(blocks, 1, again, FINISHED)


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [([], "live tables give"), ([[0], [0]], "live tables give"), ([[0, 0]], "twice in one table")],
    ids=["leaked", "shared unasked", "twice in a table"],
)
def test_the_integrity_check_sees_a_wrong_table(tables: list[list[int]], complaint: str) -> None:
    blocks = BlockManager(2, SIZE)
    take(blocks, 1, 1)

    with pytest.raises(AssertionError, match=complaint):
        blocks.check_integrity(tables)


def test_many_hits_at_once_are_one_after_the_other() -> None:
    one_by_one, at_once = BlockManager(6, SIZE), BlockManager(6, SIZE)
    for blocks in (one_by_one, at_once):
        give_back(blocks, 1, fill(blocks, 1, prompt(1, 2, 3, 4)))
    found = at_once.find_prefix(prompt(1, 2, 3, 4), [], 2)

    for seq_id in (5, 6, 7):
        hit(one_by_one, seq_id, found.tolist())
    at_once.hit(np.array([5, 6, 7]), found)

    assert list(at_once.events) == list(one_by_one.events)
    at_once.check_integrity([found.tolist()] * 3)


def test_shared_blocks_that_are_given_back_at_once_are_given_back_one_after_the_other() -> None:
    one_by_one, at_once = BlockManager(8, SIZE), BlockManager(8, SIZE)
    for blocks in (one_by_one, at_once):
        shared = fill(blocks, 1, prompt(1, 2, 3, 4))
        hit(blocks, 2, shared)
        hit(blocks, 3, shared[:1])
        tables = {1: shared, 2: [*shared, *take(blocks, 2, 2)], 3: [shared[0], *take(blocks, 3, 1)]}
        if blocks is one_by_one:
            freed = [give_back(blocks, seq_id, table) for seq_id, table in tables.items()]
            assert freed == [0, 3, 2]
        else:
            owners = np.repeat(list(tables), [len(table) for table in tables.values()])
            together = np.concatenate([table[::-1] for table in tables.values()])
            assert blocks.free(owners, together, np.full(len(owners), REASON_CODES[FINISHED])) == 5
        blocks.check_integrity([])

    assert list(at_once.events) == list(one_by_one.events)
    assert take(at_once, 9, 8) == take(one_by_one, 9, 8), "they are evicted in another order"


@pytest.mark.parametrize("owners", [[1, 1], [1, 2]], ids=["of one sequence", "of two"])
def test_a_block_that_is_given_back_more_often_than_it_was_taken_is_our_own_bug(owners: list[int]) -> None:
    blocks = BlockManager(4, SIZE)
    (block,) = take(blocks, 1, 1)

    with pytest.raises(AssertionError, match=f"block {block} freed more often"):
        blocks.free(np.array(owners), np.array([block, block]), np.full(2, REASON_CODES[FINISHED]))


def test_a_block_stands_at_most_once_among_what_a_sequence_gives_back() -> None:
    blocks = BlockManager(4, SIZE)
    table = fill(blocks, 1, prompt(1, 2))
    hit(blocks, 2, table)

    with pytest.raises(AssertionError, match=f"block {table[0]} freed more often"):
        blocks.free(np.array([1, 1]), np.array(table * 2), np.full(2, REASON_CODES[FINISHED]))


def test_who_finds_the_same_blocks_as_the_one_before_gets_the_same_array() -> None:
    """So that they can be hit together."""
    blocks = BlockManager(6, SIZE)
    fill(blocks, 1, prompt(1, 2, 3, 4))

    first = blocks.find_prefix(prompt(1, 2, 3, 4, 5), [], 2)
    assert blocks.find_prefix(prompt(1, 2, 3, 4, 6), [], 2) is first
    shorter = blocks.find_prefix(prompt(1, 2, 7, 8, 9), [], 2)

    assert (first.tolist(), shorter.tolist()) == ([0, 1], [0])
    assert blocks.find_prefix(prompt(1, 2, 3, 4, 5), [], 2).tolist() == [0, 1]
