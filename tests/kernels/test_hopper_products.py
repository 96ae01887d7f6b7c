"""Products of many tokens with what follows them, in kernels for compute capability 9.0."""

import pytest
import torch
from torch import Tensor

from kernels import hopper, reference
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn

pytestmark = pytest.mark.gpu
if torch.cuda.is_available():
    from kernels.hopper_products import hopper_linear_norm_rotary_store, hopper_linear_silu_mul
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
token_counts = pytest.mark.parametrize("num_tokens", [128, 1153, 4000])
"""A tile, one token in the last one, and more tiles than there are programs."""
NUM_Q, NUM_KV, HEAD_SIZE, BLOCK_SIZE = 6, 2, 128, 16


def last_bit(exact: Tensor, dtype: torch.dtype) -> float:
    """Of the largest result: torch's own sum may happen to come out even closer."""
    return float(exact.abs().max()) * torch.finfo(dtype).eps


@dtypes
@token_counts
@pytest.mark.parametrize(("depth", "width"), [(64, 128), (1024, 3072)])
def test_the_gate_is_applied_as_exactly_as_in_torch(
    num_tokens: int, depth: int, width: int, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, depth, dtype=dtype, device=DEVICE)
    weight = randn(2 * width, depth, seed=1, dtype=dtype, device=DEVICE) * depth**-0.5
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    expected = reference.linear_silu_mul(x, weight)
    for _ in range(3):
        assert_as_exact_as_torch(hopper_linear_silu_mul(x, weight), expected, exact.cpu(), floor=last_bit(exact, dtype))


def heads(num_tokens: int, depth: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What linear_norm_rotary_store takes; every seventh token is padding, caches are full of 7s."""
    num_blocks = num_tokens // BLOCK_SIZE + 2
    cache = torch.full((num_blocks, NUM_KV, BLOCK_SIZE, HEAD_SIZE), 7.0, dtype=dtype)
    order = torch.randperm(num_blocks * BLOCK_SIZE, generator=torch.Generator().manual_seed(3))[:num_tokens]
    given = {
        "x": randn(num_tokens, depth, dtype=dtype),
        "weight": randn((NUM_Q + 2 * NUM_KV) * HEAD_SIZE, depth, seed=1, dtype=dtype) * depth**-0.5,
        "q_weight": randn(HEAD_SIZE, seed=2, dtype=dtype),
        "k_weight": randn(HEAD_SIZE, seed=4, dtype=dtype),
        "rotary": reference.rotary_table(HEAD_SIZE, 10_000.0, 5000, torch.device("cpu")),
        "positions": torch.arange(num_tokens) * 31 % 5000,
        "k_cache": cache.clone(),
        "v_cache": cache.clone(),
        "slots": torch.where(torch.arange(num_tokens) % 7 == 0, -1, order),
    }
    return {name: value.to(DEVICE) for name, value in given.items()}


@dtypes
@token_counts
@pytest.mark.parametrize("depth", [64, 1024])
def test_heads_are_normed_rotated_and_stored_as_exactly_as_in_torch(
    num_tokens: int, depth: int, dtype: torch.dtype
) -> None:
    given = heads(num_tokens, depth, dtype)
    theirs = {name: value.clone() for name, value in given.items()}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    exact = reference.linear_norm_rotary_store(**wide, eps=1e-6)
    expected = reference.linear_norm_rotary_store(**theirs, eps=1e-6)
    for _ in range(3):
        ours = {name: value.clone() for name, value in given.items()}
        actual = hopper_linear_norm_rotary_store(**ours, eps=1e-6)
        assert_as_exact_as_torch(actual, expected, exact.cpu(), floor=last_bit(exact, dtype))
        for name in ("k_cache", "v_cache"):
            floor = last_bit(wide[name], dtype)
            assert_as_exact_as_torch(ours[name], theirs[name], wide[name].cpu(), floor=floor)
            untouched = (theirs[name] == 7).all(-1)
            assert untouched.any()
            assert torch.equal(ours[name][untouched], theirs[name][untouched])


@dtypes
def test_a_nan_token_stays_alone(dtype: torch.dtype) -> None:
    given = heads(2000, 128, dtype)
    given["x"][78] = torch.nan
    out = hopper_linear_norm_rotary_store(**given, eps=1e-6)
    assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [78]
    for name in ("k_cache", "v_cache"):
        tokens = given[name].transpose(1, 2).flatten(0, 1)
        assert tokens.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [int(given["slots"][78])]
    weight = randn(256, 128, seed=1, dtype=dtype, device=DEVICE)
    assert hopper_linear_silu_mul(given["x"], weight).isnan().any(1).nonzero().flatten().tolist() == [78]


@dtypes
def test_a_token_does_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    x, weight = randn(3000, 256, dtype=dtype, device=DEVICE), randn(512, 256, seed=1, dtype=dtype, device=DEVICE)
    whole = hopper_linear_silu_mul(x, weight)
    for count in (1, 1500, 2999):
        assert torch.equal(hopper_linear_silu_mul(x[:count].clone(), weight), whole[:count])


@pytest.mark.parametrize(
    ("num_tokens", "columns", "depth", "dtype", "is_ours"),
    [
        (2048, 6144, 1024, torch.bfloat16, True),
        (8192, 4096, 1024, torch.float16, True),
        (1024, 4096, 1024, torch.bfloat16, True),
        (1536, 6144, 1024, torch.bfloat16, False),
        (512, 4096, 1024, torch.bfloat16, False),
        (8192, 4096 + 128, 1024, torch.bfloat16, False),
        (8192, 4096, 1000, torch.bfloat16, False),
        (8192, 4096, 1024, torch.float32, False),
    ],
)
def test_what_does_not_fill_the_device_is_left_to_the_library(
    num_tokens: int, columns: int, depth: int, dtype: torch.dtype, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "num_programs", lambda device: 132)
    x = torch.empty(num_tokens, depth, dtype=dtype, device=DEVICE)
    weight = torch.empty(columns, depth, dtype=dtype, device=DEVICE)
    assert hopper.is_product_of_many(x, weight) == is_ours
