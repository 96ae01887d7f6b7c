import numpy as np
import pytest
import torch

from kernels.paged_decode_attention import paged_decode_attention
from kernels.shared_prefix_attention import members_per_item, shared_prefix_attention
from nanovllm.runner.shared_prefixes import PrefixGroup
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, Paged, assert_as_exact_as_torch, randn
from tests.kernels.work import decode_work, limits


def check(paged: Paged, groups: list[PrefixGroup], heads: int, dtype: torch.dtype, programs: int = 8) -> None:
    kv_heads, head_size = paged.k_cache.shape[1], paged.k_cache.shape[3]
    scale = head_size**-0.5
    most = members_per_item(dtype, head_size, heads // kv_heads)
    work = decode_work(paged, heads, groups, limits(kv_heads, num_programs=programs, members_per_item=most))
    q = randn(len(paged.contexts), heads, head_size, seed=99, dtype=dtype)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
    caches = paged.k_cache, paged.v_cache, paged.tables
    shared_prefix_attention(q.to(DEVICE), *caches, work, scale)
    paged_decode_attention(q.to(DEVICE), *caches, work, 0, scale, out)
    rows = [(q[i : i + 1], i, scale) for i in range(len(paged.contexts))]
    exact = torch.cat([paged.exact(*row) for row in rows])
    expected = torch.cat([paged.exact(*row, dtype) for row in rows])
    assert_as_exact_as_torch(out, expected, exact, floor=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_groups_and_rows_that_share_nothing(block_size: int, dtype: torch.dtype) -> None:
    contexts = [700, 641, 655, 130, 900, 710, 512, 400]
    shared = {1: (0, 640), 2: (0, 640), 5: (4, 448), 6: (4, 448)}
    paged = Paged(contexts, 2, 64, block_size, dtype=dtype, device=DEVICE, shared=shared)
    groups = [
        PrefixGroup(np.array([0, 1, 2]), 640 // block_size),
        PrefixGroup(np.array([4, 5, 6]), 448 // block_size),
    ]
    check(paged, groups, 4, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (5, 1)])
def test_more_members_than_an_item_takes(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    count, tokens = 40, 64
    shared = dict.fromkeys(range(1, count), (0, tokens))
    paged = Paged([tokens + 1 + i for i in range(count)], kv_heads, 32, 16, dtype=dtype, device=DEVICE, shared=shared)
    check(paged, [PrefixGroup(np.arange(count), tokens // 16)], heads, dtype, programs=1)


@pytest.mark.gpu
def test_a_thousand_rows_on_one_long_prefix() -> None:
    shared = dict.fromkeys(range(1, 1000), (0, 2048))
    contexts = [2049 + i % 200 for i in range(1000)]
    paged = Paged(contexts, 2, 128, 16, dtype=torch.bfloat16, device=DEVICE, shared=shared)
    check(paged, [PrefixGroup(np.arange(1000), 128)], 4, torch.bfloat16, programs=132)
