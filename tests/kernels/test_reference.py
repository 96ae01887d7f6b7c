"""The definitions against torch's own operations in float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import reference as ops
from tests.kernels.paged import Paged, randn

BLOCK_SIZES = [1, 3, 16, 64, 256]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(4, 4, 32), (4, 2, 64), (8, 1, 128)])
def test_decode_attention(block_size: int, heads: int, kv_heads: int, head_size: int) -> None:
    paged = Paged([1, 17, 63, 64, 65, 300], kv_heads, head_size, block_size)
    q = randn(len(paged.contexts), heads, head_size, seed=99)
    scale = head_size**-0.5
    lens = torch.tensor(paged.contexts, dtype=torch.int32)
    out = ops.paged_decode_attention(q, paged.k_cache, paged.v_cache, paged.tables, lens, scale)
    for i in range(len(paged.contexts)):
        assert (out[i].double() - paged.exact(q[i : i + 1], i, scale)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_prefill_attention_of_whole_prompts_and_of_chunks(block_size: int) -> None:
    contexts, queries = [1, 40, 64, 130, 200], [1, 40, 1, 30, 136]
    paged = Paged(contexts, 2, 64, block_size)
    q = randn(sum(queries), 4, 64, seed=99)
    out = ops.paged_prefill_attention(q, paged.k_cache, paged.v_cache, paged.tables, queries, contexts, 0.125)
    first = 0
    for i, count in enumerate(queries):
        rows = slice(first, first + count)
        assert (out[rows].double() - paged.exact(q[rows], i, 0.125)).abs().max() < 1e-5
        first += count


def test_store_kv_writes_its_slots_and_nothing_else() -> None:
    k_cache, v_cache = torch.full((4, 2, 8, 16), 7.0), torch.full((4, 2, 8, 16), 9.0)
    k, v = randn(3, 2, 16), randn(3, 2, 16, seed=1)
    ops.store_kv(k, v, k_cache, v_cache, torch.tensor([13, -1, 31]))
    expected_k, expected_v = torch.full((32, 2, 16), 7.0), torch.full((32, 2, 16), 9.0)
    expected_k[[13, 31]], expected_v[[13, 31]] = k[[0, 2]], v[[0, 2]]
    assert torch.equal(k_cache.transpose(1, 2).flatten(0, 1), expected_k)
    assert torch.equal(v_cache.transpose(1, 2).flatten(0, 1), expected_v)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rms_norm(scale: float) -> None:
    x, residual, weight = randn(5, 96) * scale, randn(5, 96, seed=1) * scale, randn(96, seed=2)
    exact = F.rms_norm((x.double() + residual.double()), (96,), weight.double(), 1e-6)
    out, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, ops.rms_norm(total, weight, 1e-6))
    assert (out.double() - exact).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    x = randn(7, 128, dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    exact = F.silu(gate) * up
    error = (ops.silu_mul(x).double() - exact).abs().max()
    torch_gate, torch_up = x.chunk(2, -1)
    assert error <= 2 * (F.silu(torch_gate) * torch_up - exact).abs().max() + 1e-12


def test_silu_mul_of_very_negative_gates_is_zero() -> None:
    assert (ops.silu_mul(torch.tensor([[-1e4, -200.0, 1.0, 1.0]])) == 0).all()


def test_rotary_turns_each_pair_by_its_angle() -> None:
    table = ops.rotary_table(8, 10_000.0, 50, torch.device("cpu"))
    x, positions = randn(3, 2, 8), torch.tensor([0, 7, 49])
    out = ops.apply_rotary(x, table[positions])
    angles = positions.double()[:, None] / 10_000.0 ** (torch.arange(4).double() / 4)
    turned = torch.polar(torch.ones_like(angles), angles)[:, None] * torch.complex(x[..., :4], x[..., 4:])
    assert (out - torch.cat([turned.real, turned.imag], -1)).abs().max() < 1e-5
    assert torch.equal(out[0], x[0])
