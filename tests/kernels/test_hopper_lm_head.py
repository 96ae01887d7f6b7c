"""The LM head's product for compute capability 9.0, and the blocks that sampling draws from.

Logits may differ from the float64 product's by their rounding and the order of a float32 sum; maxima and sums are
judged by the logits that were stored.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.draws import Draws
from kernels.linear_sample import linear_sample
from kernels.sample import Blocks, pick_tokens, sample
from tests.kernels.paged import DEVICE, randn
from tests.kernels.test_sample_kernel import CASES, make_draws, mixed_draws

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="no device of compute capability 9.0")]
if IS_HOPPER:
    from kernels.hopper_lm_head import FEW, hopper_lm_head
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
QWEN3 = (151_936, 1024)
SMALL = (9001, 192)
"""Vocabulary and depth: the last block is short, and a row of its logits is no multiple of 16 bytes."""
SHAPES = [
    *((rows, *QWEN3) for rows in (17, 63, 64, 65, 128, 129, 192, 193, 256, 1000)),
    *((rows, *SMALL) for rows in (1, 64, 65, 200, 4000)),
    (300, 8192, 64),
]
OF_SUMS = 1e-4
"""How far apart two orders of a float32 sum of some 1,000 terms of order 1 may be."""


def inputs(rows: int, vocab_size: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whose products are of order 3."""
    x = randn(rows, depth, dtype=dtype, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    weight = torch.randn(vocab_size, depth, generator=generator, device=DEVICE) * (3 * depth**-0.5)
    return x, weight.to(dtype)


def settings(rows: int) -> Draws:
    """Temperatures of all kinds, by slots in another order."""
    cases = [CASES[i % len(CASES)] for i in range(rows)]
    own = mixed_draws(cases)
    slot = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(2))[:rows].to(DEVICE)
    by_slot = [
        torch.full((rows + 3,), 7, dtype=values.dtype, device=DEVICE).index_copy_(0, slot, values) for values in own[:7]
    ]
    return Draws(*by_slot, position=own.position, slot=slot)


def expected_blocks(logits: Tensor, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    """float64 maxima and sums [N, blocks]."""
    padded = F.pad(logits.double(), (0, -logits.shape[1] % size), value=-math.inf)
    x = padded.unflatten(1, (-1, size))
    maxima = x.amax(-1)
    temperature = draws.by_row().temperature.double()
    temperature = torch.where(temperature == 0, 1.0, temperature)
    base = torch.where(maxima.isfinite(), maxima, 0.0)
    return maxima, ((x - base[..., None]) / temperature[:, None, None]).exp().sum(-1)


def assert_blocks(blocks: Blocks, logits: Tensor, draws: Draws) -> None:
    part = 128  # rows at once, for want of memory
    for first in range(0, len(logits), part):
        rows = slice(first, first + part)
        maxima, sums = expected_blocks(
            logits[rows], Draws(*(setting[rows] for setting in draws.by_row()[:8])), blocks.size
        )
        assert torch.equal(blocks.maxima[rows].double(), maxima)
        assert bool(((blocks.sums[rows].double() - sums).abs() <= 1e-4 * sums).all())


@dtypes
@pytest.mark.parametrize(("rows", "vocab_size", "depth"), SHAPES)
def test_logits_and_their_blocks(rows: int, vocab_size: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = inputs(rows, vocab_size, depth, dtype)
    draws = settings(rows)
    given = [hopper_lm_head(x, weight, draws) for _ in range(3)]
    logits, blocks = given[0]
    assert logits.shape == (rows, vocab_size)
    product = x.float() @ weight.float().T  # in float32 proper: torch's default
    error = (logits.float() - product).abs()
    assert bool((error <= torch.finfo(dtype).eps * product.abs() + OF_SUMS).all())
    assert (logits == product.to(dtype)).float().mean() > 0.9
    assert_blocks(blocks, logits, draws)
    for again, their_blocks in given[1:]:
        assert torch.equal(again, logits)
        assert torch.equal(their_blocks.maxima, blocks.maxima)
        assert torch.equal(their_blocks.sums, blocks.sums)


@dtypes
@pytest.mark.parametrize("rows", [17, 100, 256])
def test_the_draws_are_those_of_the_stored_logits(rows: int, dtype: torch.dtype) -> None:
    """One uniform number in some 100,000 falls between two orders of a sum."""
    x, weight = inputs(rows, *SMALL, dtype)
    draws = settings(rows)
    logits, blocks = hopper_lm_head(x, weight, draws)
    expected = sample(logits, draws)
    assert int((pick_tokens(logits, blocks, draws) != expected).sum()) <= 1
    assert int((linear_sample(x, weight, draws) != expected).sum()) <= 1
    assert len(expected.unique()) > rows // 3


@dtypes
@pytest.mark.parametrize("rows", [20, 200])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(rows: int, bad: float, dtype: torch.dtype) -> None:
    x, weight = inputs(rows, *SMALL, dtype)
    draws = make_draws(rows, temperature=1.0)
    healthy, _ = hopper_lm_head(x, weight, draws)
    good = linear_sample(x, weight, draws).tolist()
    assert min(good) >= 0
    x[rows - 2] = bad
    logits, blocks = hopper_lm_head(x, weight, draws)
    others = torch.arange(rows, device=DEVICE) != rows - 2
    assert torch.equal(logits[others], healthy[others])
    assert blocks.sums.isfinite().all(1).tolist() == others.tolist()
    good[rows - 2] = -1
    assert linear_sample(x, weight, draws).tolist() == good


@dtypes
def test_infinite_logits_have_the_sums_that_sampling_expects(dtype: torch.dtype) -> None:
    """x is +1 or -1 and only one of the weights of an id is not 0, so that no infinity meets another."""
    x, weight = torch.ones(32, 64, dtype=dtype, device=DEVICE), torch.zeros(9001, 64, dtype=dtype, device=DEVICE)
    x[16:] = -1
    big, size = torch.finfo(dtype).max, FEW.block
    weight[0, :2] = big  # the sum rounds to infinity
    weight[size : 2 * size, :2] = big
    weight[9000, :2] = big
    logits, blocks = hopper_lm_head(x, weight, make_draws(32, temperature=1.0))
    assert logits[:16, 0].tolist() == [math.inf] * 16
    assert logits[16:, 9000].tolist() == [-math.inf] * 16
    infinite = [0, 1, 9000 // size]
    assert blocks.maxima[0].isinf().nonzero().flatten().tolist() == infinite
    assert blocks.sums[0].isinf().nonzero().flatten().tolist() == infinite
    assert blocks.maxima[31, :2].tolist() == [0, -math.inf]
    assert blocks.sums[31, :3].tolist() == [size - 1, 0, size]
    assert blocks.sums[:, -1].tolist() == [math.inf] * 16 + [9000 % size] * 16


@dtypes
@pytest.mark.parametrize("rows", [17, 65, 129, 193])
def test_nothing_is_written_behind_the_outputs(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(rows, *SMALL, dtype)
    draws = make_draws(rows, temperature=1.0)
    expected, _ = hopper_lm_head(x, weight, draws)
    buffers: list[tuple[Tensor, int]] = []

    def empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 100_000,), 7, dtype=dtype, device=device)
        buffers.append((buffer, size))
        return buffer[:size].view(shape)

    with monkeypatch.context() as patched:
        patched.setattr("kernels.hopper_lm_head.torch.empty", empty)
        logits, _ = hopper_lm_head(x, weight, draws)
    assert len(buffers) == 3
    assert torch.equal(logits, expected)
    for buffer, size in buffers:
        assert bool((buffer[size:] == 7).all())


@pytest.mark.parametrize("rows", [40, 300])
def test_a_captured_launch_computes_from_what_its_inputs_hold_at_replay(rows: int) -> None:
    x, weight = inputs(rows, *SMALL, torch.bfloat16)
    draws = make_draws(rows, temperature=1.0)
    linear_sample(x, weight, draws)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = linear_sample(x, weight, draws)
    before = linear_sample(x, weight, draws).tolist()
    x.copy_(x.flip(0))
    draws.temperature.fill_(0.3)
    for _ in range(2):
        graph.replay()
        assert tokens.tolist() == linear_sample(x, weight, draws).tolist() != before


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    x, weight = inputs(300, *SMALL, torch.bfloat16)
    draws = make_draws(300, temperature=1.0)
    whole, blocks = hopper_lm_head(x, weight, draws)
    for count in (1, 64, 65, 129, 256):
        logits, first = hopper_lm_head(x[:count], weight, draws)
        assert torch.equal(logits, whole[:count])
        assert torch.equal(first.sums, blocks.sums[:count])
