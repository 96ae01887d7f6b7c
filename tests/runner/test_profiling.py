"""The trial steps that size the KV cache are as large as steps can be."""

import pytest

from nanovllm.runner.profiling import _prefill_plan, _trials


@pytest.mark.parametrize("budget", [1, 64, 1000, 8192])
@pytest.mark.parametrize("max_num_seqs", [1, 7, 64, 1000])
@pytest.mark.parametrize("max_model_len", [2, 33, 512, 5001, 40960])
def test_trials_fill_the_budget_as_far_as_rows_and_lengths_allow(
    budget: int, max_num_seqs: int, max_model_len: int
) -> None:
    if max_num_seqs > budget:
        return  # refused by the configuration
    trials = _trials(budget, max_num_seqs, max_model_len)
    for lengths in trials:
        assert len(lengths) <= max_num_seqs
        assert all(1 <= length < max_model_len for length in lengths)
        assert sum(lengths) <= budget
    assert max(map(sum, trials)) == min(budget, max_num_seqs * (max_model_len - 1))
    assert max(map(len, trials)) == max_num_seqs


def test_a_trials_plan_gives_every_row_its_own_blocks() -> None:
    plan = _prefill_plan([33, 16, 1], 16)
    assert plan.table_slots.tolist() == [0, 0, 0, 1, 2]
    assert plan.table_columns.tolist() == [0, 1, 2, 0, 0]
    assert plan.table_blocks.tolist() == [0, 1, 2, 3, 4]
    assert plan.num_prefill_tokens == plan.num_tokens.sum() == 50
