"""The longest common prefix with an earlier prompt, against the definition."""

import copy

import numpy as np
import pytest

from jobs.shared_prefix import SharedPrefixIndex


def common(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("vocabulary", [2, 5, 151_936])
def test_the_answer_is_that_of_brute_force_over_all_earlier_prompts(vocabulary: int):
    rng = np.random.default_rng(vocabulary)
    index, earlier = SharedPrefixIndex(), []
    for row in range(600):
        prompt = rng.integers(0, vocabulary, rng.integers(1, 30)).astype(np.int32)
        if earlier and rng.random() < 0.5:
            start = earlier[rng.integers(len(earlier))]
            prompt = np.concatenate([start[: rng.integers(1, len(start) + 1)], prompt[: rng.integers(0, 4)]])
        shared = index.add(row, prompt)
        longest = max((common(prompt, other) for other in earlier), default=0)
        assert shared.num_tokens == longest
        if longest == 0:
            assert shared.row is None
        else:
            assert common(prompt, earlier[shared.row]) == longest
        earlier.append(prompt)


def test_token_ids_compare_as_numbers_whatever_their_bytes():
    index = SharedPrefixIndex()
    for row, token in enumerate([0x0100, 0x00FF, 0x01000000, 0x7FFFFFFF]):
        assert index.add(row, ids(7, token)).num_tokens == (1 if row else 0)
    assert index.add(9, ids(7, 0x00FF, 3)) == (1, 2)


def test_of_equal_prompts_the_first_row_is_named():
    index = SharedPrefixIndex()
    assert index.add(0, ids(1, 2, 3)) == (None, 0)
    assert index.add(1, ids(1, 2, 3)) == (0, 3)
    assert index.add(2, ids(1, 2, 3)) == (0, 3)
    assert index.add(3, ids(1, 2)) == (0, 2)
    assert index.add(4, ids(1, 2, 3, 4)) == (0, 3)


def test_the_samples_of_a_row_share_the_answer_of_the_first_and_are_not_each_others_predecessor():
    index = SharedPrefixIndex()
    assert [index.add(0, ids(1, 2)) for _ in range(3)] == [(None, 0)] * 3
    assert [index.add(1, ids(1, 5)) for _ in range(3)] == [(0, 1)] * 3


def test_at_most_so_many_prompts_are_remembered_and_at_least_the_newest_half():
    index = SharedPrefixIndex(max_prompts=100)
    for row in range(1000):
        index.add(row, ids(row, 1))
        assert len(index) <= 100
        if row % 7 == 0:
            probe = copy.deepcopy(index)  # a search also adds
            assert probe.add(-1, ids(max(0, row - 49), 1)).num_tokens == 2


def test_at_most_so_many_tokens_are_remembered():
    index = SharedPrefixIndex(max_tokens=1000)
    for row in range(100):
        index.add(row, np.full(90, row, np.int32))
        assert len(index) * 90 <= 1000
    assert index.add(100, np.full(5000, 3, np.int32)).row is None
    assert index.add(101, ids(1)) == (None, 0), "a prompt beyond the bound is not kept, and the index still works"


def test_a_prompt_that_comes_again_counts_as_new():
    index = SharedPrefixIndex(max_prompts=10)
    for row in range(0, 100, 2):
        index.add(row, ids(9, 9, 9))
        index.add(row + 1, ids(row, 1, 1))
    assert index.add(100, ids(9, 9, 9, 1)) == (0, 3)
