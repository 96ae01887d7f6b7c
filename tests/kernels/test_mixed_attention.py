import numpy as np
import pytest
import torch

from kernels import mixed_attention
from kernels.attention_work import PrefillWork
from kernels.paged_prefill_attention import tokens_per_item
from nanovllm.runner.batch import prefill_items
from nanovllm.runner.shared_prefixes import PrefixGroup
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, Paged, assert_as_exact_as_torch, randn
from tests.kernels.work import decode_work, limits

SHAPES = [(4, 2, 64), (16, 8, 128)]


def check(
    decodes: list[int],
    prefills: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    shared_rows: int = 0,
    layers: int = 1,
) -> None:
    """`decodes`: contexts; `prefills`: (context, new tokens). The first `shared_rows` decodes share 64 tokens."""
    heads, kv_heads, head_size = shape
    contexts = [*decodes, *(context for context, _ in prefills)]
    shared = dict.fromkeys(range(1, shared_rows), (0, 64))
    paged = Paged(contexts, kv_heads, head_size, 16, dtype=dtype, device=DEVICE, shared=shared)
    queries = [1] * len(decodes) + [count for _, count in prefills]
    groups = [PrefixGroup(np.arange(shared_rows), 4)] if shared_rows else []
    # Contexts of the prefills are in the tables too, but no item of the decode work names them.
    only_decodes = Paged.__new__(Paged)
    only_decodes.__dict__ = {**paged.__dict__, "contexts": decodes}
    decode = decode_work(only_decodes, heads, groups, limits(kv_heads))
    counts = np.array([count for _, count in prefills])
    starts = np.array([context - count for context, count in prefills])
    slots = np.arange(len(decodes), len(contexts))
    items = prefill_items(counts, starts, slots, tokens_per_item(dtype, head_size, heads // kv_heads))
    items[:, 0] += len(decodes)
    prefill = PrefillWork(
        items=torch.from_numpy(np.ascontiguousarray(items)).to(DEVICE),
        bounds=torch.tensor([0, 0, len(items)], dtype=torch.int32, device=DEVICE),
        counters=torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    q = randn(sum(queries), heads, head_size, seed=99, dtype=dtype)
    scale = head_size**-0.5
    caches = paged.k_cache, paged.v_cache, paged.tables
    for layer in range(layers):
        out = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
        mixed_attention.mixed_attention(q.to(DEVICE), *caches, decode, prefill, layer, scale, out)
    first = 0
    for i, count in enumerate(queries):
        rows = slice(first, first + count)
        exact, expected = (paged.exact(q[rows], i, scale, wanted) for wanted in (torch.float64, dtype))
        assert_as_exact_as_torch(out[rows], expected, exact, floor=1e-5)
        first += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_rows", [0, 4])
def test_rows_that_decode_beside_rows_that_prefill(
    shape: tuple[int, int, int], dtype: torch.dtype, shared_rows: int
) -> None:
    prefills = [(70, 70), (130, 31), (1, 1)]
    check([65, 90, 80, 300, 1, 17], prefills, shape, dtype, shared_rows=shared_rows, layers=2)


@pytest.mark.gpu
def test_both_kernels_run_at_the_same_time_and_are_right() -> None:
    """Rows enough that each kernel is at work while the other one is; 16-bit, for which they are made to fit."""
    q = torch.empty(1, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    assert mixed_attention._side_by_side(q)
    check([515] * 100, [(512, 512)] * 12, (16, 8, 128), torch.bfloat16, layers=2)
    check([600] * 100, [(512, 448)] * 6, (16, 8, 128), torch.bfloat16, shared_rows=60)
