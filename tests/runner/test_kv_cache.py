"""How many blocks a cache gets."""

import pytest
import torch

from nanovllm.config import KVConfig
from nanovllm.models.model_config import parse_config
from nanovllm.runner.kv_cache import CPU_CACHE_BYTES, allocate, block_bytes, choose_num_blocks
from tests.checkpoints import qwen3_config

CONFIG = parse_config(qwen3_config())


def test_block_bytes_are_those_of_the_allocated_cache() -> None:
    cache = allocate(CONFIG, 5, 8, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 5 * block_bytes(CONFIG, 8, torch.float32)


PLENTY = 100 * CPU_CACHE_BYTES


def test_a_cpu_cache_is_small_unless_told() -> None:
    assert choose_num_blocks(KVConfig(), 1000, PLENTY, on_gpu=False) == CPU_CACHE_BYTES // 1000
    assert choose_num_blocks(KVConfig(num_blocks=7), 1000, PLENTY, on_gpu=False) == 7
    assert choose_num_blocks(KVConfig(), 2 * CPU_CACHE_BYTES, PLENTY, on_gpu=False) == 1
    assert choose_num_blocks(KVConfig(), 1000, 100_000, on_gpu=False) == 90


def test_a_gpu_cache_fills_the_fraction_of_what_is_free() -> None:
    assert choose_num_blocks(KVConfig(memory_fraction=0.5), 1000, 100_000, on_gpu=True) == 50
    assert choose_num_blocks(KVConfig(num_blocks=100), 1000, 100_000, on_gpu=True) == 100


@pytest.mark.parametrize("on_gpu", [False, True])
def test_more_blocks_than_fit_are_refused_with_the_number_that_fits(on_gpu: bool) -> None:
    with pytest.raises(ValueError, match=r"kv\.num_blocks=101.*at most 100 blocks fit"):
        choose_num_blocks(KVConfig(num_blocks=101), 1000, 100_000, on_gpu)


@pytest.mark.parametrize("available", [-5_000, 0, 1_000])
def test_no_room_for_a_block_is_one_clear_error(available: int) -> None:
    with pytest.raises(ValueError, match=r"kv\.memory_fraction=0\.9.*holds no KV block"):
        choose_num_blocks(KVConfig(), 1000, available, on_gpu=True)
