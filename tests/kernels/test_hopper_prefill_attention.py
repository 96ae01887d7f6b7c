"""Prefill attention by the kernel for compute capability 9.0, for items that see many keys and for the others."""

import numpy as np
import pytest
import torch

from kernels import hopper
from kernels.attention_work import LONG_ITEM_KEYS, PrefillWork
from kernels.paged_prefill_attention import tokens_per_item
from kernels.prefill_attention import prefill_attention
from nanovllm.runner.batch import prefill_items
from tests.kernels.paged import DEVICE, Paged, assert_as_exact_as_torch, randn

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="no device of compute capability 9.0")]


def check(
    contexts: list[int],
    queries: list[int],
    shape: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    long_keys: int = LONG_ITEM_KEYS,
) -> None:
    """Items that see more than `long_keys` go to the kernel for long ones."""
    heads, kv_heads, head_size = shape
    paged = Paged(contexts, kv_heads, head_size, block_size, dtype=dtype, device=DEVICE)
    # A layer's queries are part of its projection, so tokens lie apart.
    q = randn(sum(queries), heads + 2, head_size, seed=99, dtype=dtype).to(DEVICE)[:, :heads]
    assert hopper.is_prefill_attention(q, paged.k_cache)
    counts = np.array(queries)
    most = tokens_per_item(dtype, head_size, heads // kv_heads)
    items = prefill_items(counts, np.array(contexts) - counts, np.arange(len(counts)), most)
    num_long = int(np.sum(items[:, 1] + items[:, 3] > long_keys))
    work = PrefillWork(
        items=torch.from_numpy(np.ascontiguousarray(items)).to(DEVICE),
        bounds=torch.tensor([0, num_long, len(items)], dtype=torch.int32, device=DEVICE),
        counters=torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    scale = head_size**-0.5
    outs = []
    for _ in range(2):
        out = torch.full((len(q), heads, head_size), torch.nan, dtype=dtype, device=DEVICE)
        prefill_attention(q, paged.k_cache, paged.v_cache, paged.tables, work, 1, scale, out)
        outs.append(out)
    assert torch.equal(*outs)
    first = 0
    for i, count in enumerate(queries):
        rows = slice(first, first + count)
        exact, expected = (paged.exact(q[rows].cpu(), i, scale, wanted) for wanted in (torch.float64, dtype))
        assert_as_exact_as_torch(outs[0][rows], expected, exact, floor=1e-5)
        first += count


CONTEXTS = [1, 2, 63, 64, 65, 130, 200, 257, 511]
QUERIES = [1, 1, 63, 64, 65, 30, 136, 2, 400]


@pytest.mark.parametrize("long_keys", [0, 100, LONG_ITEM_KEYS])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("shape", [(16, 8, 128), (4, 4, 64), (8, 1, 128), (64, 1, 64)])
def test_prompts_and_chunks_of_any_length(shape: tuple[int, int, int], block_size: int, long_keys: int) -> None:
    check(CONTEXTS, QUERIES, shape, block_size, torch.bfloat16, long_keys)


@pytest.mark.parametrize("long_keys", [0, LONG_ITEM_KEYS])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_blocks_of_any_size(block_size: int, long_keys: int) -> None:
    check(CONTEXTS, QUERIES, (4, 2, 128), block_size, torch.float16, long_keys)


@pytest.mark.parametrize("block_size", [16, 256])
def test_more_items_than_programs_some_of_them_long(block_size: int) -> None:
    check([2500, 700, 4097, 513, 512], [2500, 300, 1025, 513, 500], (16, 8, 128), block_size, torch.bfloat16)
