import numpy as np
import pytest
import torch

from kernels.attention_work import PrefillWork
from kernels.paged_prefill_attention import paged_prefill_attention, tokens_per_item
from nanovllm.runner.batch import prefill_items
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, Paged, assert_as_exact_as_torch, randn


def check(
    contexts: list[int],
    queries: list[int],
    shape: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
) -> None:
    heads, kv_heads, head_size = shape
    paged = Paged(contexts, kv_heads, head_size, block_size, dtype=dtype, device=DEVICE)
    q = randn(sum(queries), heads, head_size, seed=99, dtype=dtype)
    counts = np.array(queries)
    most = tokens_per_item(dtype, head_size, heads // kv_heads)
    items = prefill_items(counts, np.array(contexts) - counts, np.arange(len(counts)), most)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
    work = PrefillWork(
        items=torch.from_numpy(np.ascontiguousarray(items)).to(DEVICE),
        bounds=torch.tensor([0, 0, len(items)], dtype=torch.int32, device=DEVICE),
        counters=torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    scale = head_size**-0.5
    paged_prefill_attention(q.to(DEVICE), paged.k_cache, paged.v_cache, paged.tables, work, 1, scale, out)
    first = 0
    for i, count in enumerate(queries):
        rows = slice(first, first + count)
        exact, expected = (paged.exact(q[rows], i, scale, wanted) for wanted in (torch.float64, dtype))
        assert_as_exact_as_torch(out[rows], expected, exact, floor=1e-5)
        first += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4, 32), (4, 2, 64), (16, 8, 128), (5, 1, 128)])
def test_whole_prompts(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check([1, 40, 64, 130], [1, 40, 64, 130], shape, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
def test_chunks_behind_what_is_cached(block_size: int, dtype: torch.dtype) -> None:
    check([1, 40, 64, 130, 200, 257], [1, 1, 63, 30, 136, 2], (4, 2, 64), block_size, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("shape", [(16, 8, 128), (4, 2, 64)])
def test_long_contexts(shape: tuple[int, int, int], block_size: int) -> None:
    check([2500, 700, 4097], [2500, 300, 1025], shape, block_size, torch.bfloat16)
