"""Blocks that nobody uses, against a list that says the same."""

import random

import numpy as np
import pytest

from nanovllm.engine.free_blocks import CachedBlocks, EmptyBlocks


def array(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def test_the_empty_block_that_was_put_back_last_is_taken_first() -> None:
    empty = EmptyBlocks(4)

    assert empty.take(3).tolist() == [0, 1, 2]
    empty.put(array(1, 0))

    assert len(empty) == 3
    assert empty.take(0).tolist() == []
    assert empty.take(3).tolist() == [0, 1, 3]


def test_no_more_blocks_can_be_empty_than_there_are() -> None:
    empty = EmptyBlocks(2)
    empty.take(1)

    with pytest.raises(AssertionError, match="3 of 2"):
        empty.put(array(0, 1))


def test_no_more_blocks_can_be_taken_than_are_cached() -> None:
    cached = CachedBlocks(2)
    cached.put(array(1))

    with pytest.raises(AssertionError, match="2 blocks asked for, 1 are cached"):
        cached.take(2)


@pytest.mark.parametrize("seed", range(40))
def test_cached_blocks_are_taken_in_the_order_in_which_they_were_put_there(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks = rng.choice((1, 3, 8, 40))
    cached, expected = CachedBlocks(num_blocks), list[int]()
    for _ in range(200):
        others = [block for block in range(num_blocks) if block not in expected]
        match rng.choice(("put", "put", "remove", "take")):
            case "put":
                blocks = rng.sample(others, rng.randint(0, len(others)))
                cached.put(array(*blocks))
                expected += blocks
            case "remove":
                blocks = rng.sample(expected, rng.randint(0, len(expected)))
                cached.remove(array(*blocks))
                expected = [block for block in expected if block not in blocks]
            case _ if expected:
                count = rng.randint(1, len(expected))
                assert cached.take(count).tolist() == expected[:count]
                expected = expected[count:]
        assert len(cached) == len(expected)
        assert cached.tolist() == expected
