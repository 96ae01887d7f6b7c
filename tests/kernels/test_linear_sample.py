"""The LM head's product and the draw from it are one operation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import linear_sample as kernel
from kernels import reference
from kernels.draws import Draws
from tests.kernels.paged import DEVICE, randn
from tests.kernels.test_sample_kernel import CASES, make_draws, mixed_draws

DEPTH, VOCAB = 32, 1100
LinearSample = Callable[..., Tensor]
IMPLEMENTATIONS = pytest.mark.parametrize("linear_sample", [reference.linear_sample, kernel.linear_sample])


@IMPLEMENTATIONS
def test_a_token_is_drawn_from_each_row_of_the_product(linear_sample: LinearSample) -> None:
    x, weight = randn(len(CASES), DEPTH, device=DEVICE), randn(VOCAB, DEPTH, seed=1, device=DEVICE)
    draws = mixed_draws(CASES)
    expected = reference.sample(x @ weight.T, draws).tolist()
    assert len(set(expected)) > len(CASES) // 2
    assert linear_sample(x, weight, draws).tolist() == expected


@IMPLEMENTATIONS
def test_rows_behind_the_draws_are_padding(linear_sample: LinearSample) -> None:
    x, weight = randn(16, DEPTH, device=DEVICE), randn(VOCAB, DEPTH, seed=1, device=DEVICE)
    x[5:] = torch.nan
    tokens = linear_sample(x, weight, make_draws(5, temperature=1.0)).tolist()
    assert len(tokens) == 5
    assert min(tokens) >= 0


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, in the interpreter
@IMPLEMENTATIONS
def test_slots_keep_their_tokens(linear_sample: LinearSample) -> None:
    x, weight = randn(3, DEPTH, device=DEVICE), randn(VOCAB, DEPTH, seed=1, device=DEVICE)
    x[1] = torch.nan
    own, slot = make_draws(3, temperature=[0.0, 1.0, 0.5]), torch.tensor([4, 0, 2], device=DEVICE)
    by_slot = [torch.zeros(5, dtype=values.dtype, device=DEVICE).index_copy_(0, slot, values) for values in own[:7]]
    kept = torch.full((5,), 9, dtype=torch.int32, device=DEVICE)
    tokens = linear_sample(x, weight, Draws(*by_slot, position=own.position, slot=slot), kept).tolist()
    assert tokens == linear_sample(x, weight, own).tolist()
    assert tokens[1] == -1
    assert kept.tolist() == [0, 9, tokens[2], 9, tokens[0]]


def test_of_padding_alone_nothing_is_drawn() -> None:
    weight = randn(VOCAB, DEPTH, device=DEVICE)
    for rows in (0, 16):
        none = make_draws(0, temperature=1.0)
        assert kernel.linear_sample(randn(rows, DEPTH, device=DEVICE), weight, none).tolist() == []
