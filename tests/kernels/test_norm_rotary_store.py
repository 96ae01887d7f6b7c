import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.norm_rotary_store import norm_rotary_store
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn

BLOCKS = 6


def inputs(num_q: int, num_kv: int, head_size: int, block_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Five tokens, one of them padding; caches full of 7s."""
    cache = torch.full((BLOCKS, num_kv, block_size, head_size), 7.0, dtype=dtype)
    return {
        "qkv": randn(5, num_q + 2 * num_kv, head_size, dtype=dtype),
        "q_weight": randn(head_size, seed=1, dtype=dtype),
        "k_weight": randn(head_size, seed=2, dtype=dtype),
        "rotary": reference.rotary_table(head_size, 10_000.0, 600, torch.device("cpu")),
        "positions": torch.tensor([0, 3, 599, 17, 0]),
        "k_cache": cache.clone(),
        "v_cache": cache.clone(),
        "slots": torch.tensor([BLOCKS * block_size - 1, 0, block_size, -1, 2 * block_size + 1]),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [3, 16, 256])
@pytest.mark.parametrize(("num_q", "num_kv", "head_size"), [(4, 2, 64), (16, 8, 128), (5, 1, 128), (3, 3, 16)])
def test_does_what_the_reference_does(
    num_q: int, num_kv: int, head_size: int, block_size: int, dtype: torch.dtype
) -> None:
    given = inputs(num_q, num_kv, head_size, block_size, dtype)
    theirs = {name: value.clone() for name, value in given.items()}
    ours = {name: value.clone().to(DEVICE) for name, value in given.items()}
    wide = {name: value.double() if value.is_floating_point() else value.clone() for name, value in given.items()}
    exact = reference.norm_rotary_store(**wide, eps=1e-6)
    expected = reference.norm_rotary_store(**theirs, eps=1e-6)
    actual = norm_rotary_store(**ours, eps=1e-6)
    assert_as_exact_as_torch(actual, expected, exact, floor=1e-6)
    assert_as_exact_as_torch(ours["k_cache"], theirs["k_cache"], wide["k_cache"], floor=1e-6)
    assert torch.equal(ours["v_cache"].cpu(), theirs["v_cache"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_outside_its_slots_stay(dtype: torch.dtype) -> None:
    given = inputs(4, 2, 64, 16, dtype)
    ours = {name: value.to(DEVICE) for name, value in given.items()}
    norm_rotary_store(**ours, eps=1e-6)
    live = given["slots"][given["slots"] >= 0]
    for name in ("k_cache", "v_cache"):
        tokens = ours[name].cpu().transpose(1, 2).flatten(0, 1)
        written = (tokens != 7).flatten(1).any(1)
        assert sorted(written.nonzero().flatten().tolist()) == sorted(live.tolist())


def test_a_nan_token_stays_alone() -> None:
    ours = {name: value.to(DEVICE) for name, value in inputs(4, 2, 64, 16, torch.float32).items()}
    ours["qkv"][1] = math.nan
    out = norm_rotary_store(**ours, eps=1e-6)
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False, False, False]
