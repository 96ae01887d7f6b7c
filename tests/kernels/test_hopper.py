"""Which shapes go to the kernels for compute capability 9.0; asked on any device."""

import pytest
import torch

from kernels import hopper


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "num_programs", lambda device: 132)


@pytest.mark.parametrize(
    ("num_tokens", "columns", "depth", "dtype", "is_ours"),
    [
        (2048, 6144, 1024, torch.bfloat16, True),
        (8192, 4096, 1024, torch.float16, True),
        (1024, 4096, 1024, torch.bfloat16, True),
        (1536, 6144, 1024, torch.bfloat16, False),
        (512, 4096, 1024, torch.bfloat16, False),
        (0, 6144, 1024, torch.bfloat16, False),
        (8192, 4096 + 128, 1024, torch.bfloat16, False),
        (8192, 4096, 1000, torch.bfloat16, False),
        (8192, 4096, 1024, torch.float32, False),
    ],
)
def test_products_that_do_not_fill_the_device_are_left_to_the_library(
    num_tokens: int, columns: int, depth: int, dtype: torch.dtype, is_ours: bool
) -> None:
    x, weight = torch.empty(num_tokens, depth, dtype=dtype), torch.empty(columns, depth, dtype=dtype)
    assert hopper.is_product_of_many(x, weight) == is_ours


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "dtype", "is_ours"),
    [
        (16, 8, 128, 16, torch.bfloat16, True),
        (64, 1, 64, 256, torch.float16, True),
        (14, 2, 64, 16, torch.bfloat16, False),
        (128, 1, 64, 16, torch.bfloat16, False),
        (16, 8, 96, 16, torch.bfloat16, False),
        (16, 8, 128, 8, torch.bfloat16, False),
        (16, 8, 128, 48, torch.bfloat16, False),
        (16, 8, 128, 16, torch.float32, False),
    ],
)
def test_attention_of_other_shapes_is_left_to_the_other_kernel(
    heads: int, kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, is_ours: bool
) -> None:
    q = torch.empty(1, heads, head_size, dtype=dtype)
    cache = torch.empty(1, kv_heads, block_size, head_size, dtype=dtype)
    assert hopper.is_prefill_attention(q, cache) == is_ours


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "depth", "dtype", "is_ours"),
    [
        (17, 151_936, 1024, torch.bfloat16, True),
        (4096, 8193, 64, torch.float16, True),
        (128, 151_936, 1024, torch.bfloat16, True),
        (160, 151_936, 1024, torch.bfloat16, False),
        (161, 151_936, 1024, torch.bfloat16, True),
        (16, 151_936, 1024, torch.bfloat16, False),
        (0, 151_936, 1024, torch.bfloat16, False),
        (256, 8191, 1024, torch.bfloat16, False),
        (256, 151_936, 1000, torch.bfloat16, False),
        (256, 151_936, 1024, torch.float32, False),
    ],
)
def test_heads_of_few_rows_or_ids_are_left_to_the_library(
    num_rows: int, vocab_size: int, depth: int, dtype: torch.dtype, is_ours: bool
) -> None:
    x = torch.empty(num_rows, depth, dtype=dtype, device="meta")
    assert hopper.is_lm_head(x, torch.empty(vocab_size, depth, dtype=dtype, device="meta")) == is_ours


def test_a_head_with_gaps_between_its_rows_is_left_to_the_library() -> None:
    x, weight = (torch.empty(count, 256, dtype=torch.float16, device="meta") for count in (256, 8192))
    assert not hopper.is_lm_head(x[:, :128], weight[:, :128])


def test_no_other_device_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.empty(8192, 1024, dtype=torch.bfloat16)
    assert not hopper.is_product_of_many(x, torch.empty(4096, 1024, dtype=torch.bfloat16))
    assert not hopper.is_lm_head(x, torch.empty(8192, 1024, dtype=torch.bfloat16))
