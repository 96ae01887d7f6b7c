"""How large the KV cache can be, and its memory."""

import torch
from torch import Tensor

from nanovllm.config import KVConfig
from nanovllm.errors import SettingError
from nanovllm.models.model_config import Qwen3Config

CPU_CACHE_BYTES = 512 * 2**20
"""What the cache takes on a CPU when kv.num_blocks is not set."""


def block_bytes(config: Qwen3Config, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return per_token * block_size


def choose_num_blocks(kv: KVConfig, bytes_per_block: int, available_bytes: int, on_gpu: bool) -> int:
    """Blocks of the cache; `available_bytes` is the memory that is free beside weights and activations.

    Raises SettingError where not one block fits, or kv.num_blocks asks for more than there is.
    """
    if kv.num_blocks is not None:
        if kv.num_blocks * bytes_per_block > available_bytes:
            raise SettingError(
                f"kv.num_blocks={kv.num_blocks}: {kv.num_blocks * bytes_per_block / 1e9:.2f} GB, but only "
                f"{available_bytes / 1e9:.2f} GB are free beside weights and activations; at most "
                f"{max(0, available_bytes) // bytes_per_block} blocks fit"
            )
        return kv.num_blocks
    budget = int(available_bytes * kv.memory_fraction)
    if not on_gpu:
        budget = min(budget, max(CPU_CACHE_BYTES, bytes_per_block))
    if budget < bytes_per_block:
        raise SettingError(
            f"kv.memory_fraction={kv.memory_fraction} of the {max(0, available_bytes) / 1e9:.2f} GB that are free "
            f"beside weights and activations holds no KV block of {bytes_per_block / 1e6:.2f} MB; free memory, "
            "or lower engine.max_num_batched_tokens or kv.block_size"
        )
    return budget // bytes_per_block


def allocate(config: Qwen3Config, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [layers, 2, blocks, KV heads, block size, head size].

    Raises SettingError where a GPU has not so much left, as when another process has just taken it.
    """
    shape = (config.num_hidden_layers, 2, num_blocks, config.num_key_value_heads, block_size, config.head_dim)
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise SettingError(
            f"a KV cache of {num_blocks} blocks does not fit into the memory that is free on {device}; is another "
            f"process using it? Free memory, or set kv.num_blocks or a lower kv.memory_fraction ({error})"
        ) from error
