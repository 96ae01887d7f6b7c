"""Products of many tokens with what follows them, in kernels for compute capability 9.0.

Expected is what the reference makes of the float32 product, rounded as the kernel rounds it: only the order of a sum
and an exponential's last bit may differ.
"""

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.kernels.paged import DEVICE, randn

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="no device of compute capability 9.0")]
if IS_HOPPER:
    from kernels.hopper_products import hopper_linear_norm_rotary_store, hopper_linear_silu_mul
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
token_counts = pytest.mark.parametrize("num_tokens", [128, 1153, 4000])
"""A tile, one token in the last one, and more tiles than there are programs."""
NUM_Q, NUM_KV, HEAD_SIZE, BLOCK_SIZE = 6, 2, 128, 16
OF_SUMS = 1e-4
"""How far apart two orders of a float32 sum of some 1,000 terms of order 1 may be."""


def assert_near(actual: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Element by element, within a few roundings of numbers of size `scale`; most are the same."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    allowed = 4 * torch.finfo(actual.dtype).eps * scale.double() + OF_SUMS
    assert bool((error <= allowed).all()), f"{int((~(error <= allowed)).sum())} of {error.numel()} are wrong"
    assert (actual == expected).double().mean() > 0.9


def poison(*shape: int, dtype: torch.dtype) -> None:
    """The allocator gives these bytes to the next tensor of that size."""
    torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@dtypes
@token_counts
@pytest.mark.parametrize(("depth", "width"), [(64, 128), (1024, 3072)])
def test_the_gate_is_applied(num_tokens: int, depth: int, width: int, dtype: torch.dtype) -> None:
    x = randn(num_tokens, depth, dtype=dtype, device=DEVICE)
    weight = randn(2 * width, depth, seed=1, dtype=dtype, device=DEVICE) * depth**-0.5
    product = (x.float() @ weight.float().T).to(dtype)
    expected = reference.silu_mul(product)
    gate, up = product.float().chunk(2, -1)
    outs = []
    for _ in range(3):
        poison(num_tokens, width, dtype=dtype)
        outs.append(hopper_linear_silu_mul(x, weight))
    assert_near(outs[0], expected, torch.nn.functional.silu(gate).abs() * up.abs() * (2 + gate.abs()))
    assert all(torch.equal(out, outs[0]) for out in outs)


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


def pairs(turned: Tensor) -> Tensor:
    """The size of each pair of numbers that was rotated, which rotation keeps."""
    first, second = turned.float().chunk(2, -1)
    return torch.hypot(first, second).repeat(*[1] * (turned.dim() - 1), 2)


@dtypes
@token_counts
@pytest.mark.parametrize("depth", [64, 1024])
def test_heads_are_normed_rotated_and_stored(num_tokens: int, depth: int, dtype: torch.dtype) -> None:
    given = heads(num_tokens, depth, dtype)
    theirs = {name: value.clone() for name, value in given.items()}
    product = (theirs.pop("x").float() @ theirs.pop("weight").float().T).to(dtype)
    expected = reference.norm_rotary_store(product.unflatten(-1, (-1, HEAD_SIZE)), **theirs, eps=1e-6)
    outs = []
    for _ in range(3):
        ours = {name: value.clone() for name, value in given.items()}
        poison(num_tokens, NUM_Q, HEAD_SIZE, dtype=dtype)
        outs.append((hopper_linear_norm_rotary_store(**ours, eps=1e-6), ours["k_cache"], ours["v_cache"]))
    q, k_cache, v_cache = outs[0]
    assert_near(q, expected, pairs(expected))
    assert_near(k_cache, theirs["k_cache"], pairs(theirs["k_cache"]))
    assert_near(v_cache, theirs["v_cache"], theirs["v_cache"].abs())
    assert all(torch.equal(one, other) for out in outs for one, other in zip(out, outs[0], strict=True))
    for actual, wanted in ((k_cache, theirs["k_cache"]), (v_cache, theirs["v_cache"])):
        untouched = (wanted == 7).all(-1)
        assert untouched.any()
        assert torch.equal(actual[untouched], wanted[untouched])


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
