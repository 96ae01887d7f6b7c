import pytest
import torch

from kernels.paged_decode_attention import paged_decode_attention
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, Paged, assert_as_exact_as_torch, randn
from tests.kernels.work import decode_work, limits

SHAPES = [(4, 4, 32), (4, 2, 64), (16, 8, 128), (5, 1, 128)]


def attend(paged: Paged, q: torch.Tensor, num_programs: int) -> torch.Tensor:
    heads, kv_heads = q.shape[1], paged.k_cache.shape[1]
    work = decode_work(paged, heads, [], limits(kv_heads, num_programs=num_programs))
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=DEVICE)
    args = paged.k_cache, paged.v_cache, paged.tables, work, 1, q.shape[2] ** -0.5
    paged_decode_attention(q.to(DEVICE), *args, out)
    return out


def check(contexts: list[int], shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, programs: int) -> None:
    heads, kv_heads, head_size = shape
    paged = Paged(contexts, kv_heads, head_size, block_size, dtype=dtype, device=DEVICE)
    q = randn(len(contexts), heads, head_size, seed=99, dtype=dtype)
    actual = attend(paged, q, programs)
    rows = [(q[i : i + 1], i, head_size**-0.5) for i in range(len(contexts))]
    exact = torch.cat([paged.exact(*row) for row in rows])
    expected = torch.cat([paged.exact(*row, dtype) for row in rows])
    assert_as_exact_as_torch(actual, expected, exact, floor=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check([1, 17, 63, 64, 65, 300], shape, 16, dtype, programs=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
def test_block_sizes_and_their_edges(block_size: int, dtype: torch.dtype) -> None:
    check([1, 2, 127, 128, 129, 255, 256, 257], (4, 2, 64), block_size, dtype, programs=1)


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_however_many_chunks_a_row_is_cut_into(programs: int) -> None:
    check([700, 1, 260, 129], (4, 2, 64), 16, torch.float32, programs)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("shape", [(16, 8, 128), (4, 2, 64), (32, 8, 128)])
def test_large_batches_of_unequal_lengths(shape: tuple[int, int, int], block_size: int) -> None:
    generator = torch.Generator().manual_seed(block_size)
    contexts = torch.randint(1, 3000, (60,), generator=generator).tolist()
    check(contexts, shape, block_size, torch.bfloat16, programs=396)


def test_a_row_that_no_item_names_is_left_alone() -> None:
    paged = Paged([40, 50], 2, 64, 16, device=DEVICE)
    work = decode_work(paged, 4, [], limits(2))
    work = work._replace(num_items=torch.zeros_like(work.num_items))
    out = torch.full((2, 4, 64), 7.0, device=DEVICE)
    q = randn(2, 4, 64, device=DEVICE)
    paged_decode_attention(q, paged.k_cache, paged.v_cache, paged.tables, work, 0, 0.125, out)
    assert (out == 7).all()
