"""Which implementation of the operations and of attention an engine uses, and why."""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import cast

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import SettingError
from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.attention_backends import FlashAttention, ReferenceAttention, TritonAttention
from nanovllm.layers.ops import Ops
from nanovllm.models.model_config import Qwen3Config

FLASH_ATTN_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """Names as engine.kernels and engine.attention have them, reasons for a log."""

    kernels: str
    kernels_reason: str
    attention: str
    attention_reason: str
    obstacle: str | None = None
    """Why a GPU has been left with the reference, many times slower, where nobody asked for it."""

    def ops(self) -> Ops:
        module = importlib.import_module(f"kernels.{'triton_ops' if self.kernels == 'triton' else 'reference'}")
        return cast(Ops, module)

    def backend(self) -> AttentionBackend:
        if self.attention == "flash_attn":
            return FlashAttention(importlib.import_module("flash_attn"))
        return TritonAttention() if self.attention == "triton" else ReferenceAttention()

    @property
    def capturable(self) -> bool:
        """Whether a decode step can be a CUDA graph: the reference waits for the device."""
        return self.kernels != "reference" and self.attention != "reference"


def choose_kernels(
    engine: EngineConfig, c: Qwen3Config, dtype: torch.dtype, block_size: int, device: torch.device
) -> KernelChoice:
    """Raises SettingError for a choice that cannot run this model on this device."""
    obstacle = _triton_obstacle(c, device)
    kernels, kernels_reason = _choose("engine.kernels", engine.kernels, obstacle, device)
    if engine.attention == "flash_attn":
        _check_flash_attn(c, dtype, block_size, device)
        attention, attention_reason = "flash_attn", "asked for"
    else:
        attention, attention_reason = _choose("engine.attention", engine.attention, obstacle, device)
    is_left = device.type == "cuda" and "auto" in (engine.kernels, engine.attention)
    return KernelChoice(
        obstacle=obstacle if is_left else None,
        kernels=kernels,
        kernels_reason=kernels_reason,
        attention=attention,
        attention_reason=attention_reason,
    )


def _choose(key: str, asked: str, obstacle: str | None, device: torch.device) -> tuple[str, str]:
    if asked == "triton" and obstacle is not None:
        raise SettingError(f"{key}=triton: {obstacle}; use {key}=reference")
    if asked != "auto":
        return asked, "asked for"
    if device.type != "cuda":
        return "reference", f"auto: the only implementation on {device.type}"
    return ("triton", "auto: measured fastest") if obstacle is None else ("reference", f"auto: {obstacle}")


def _triton_obstacle(c: Qwen3Config, device: torch.device) -> str | None:
    """Why the Triton kernels cannot run this model on this device; None where they can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's kernels need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if c.head_dim & (c.head_dim - 1) or not 16 <= c.head_dim <= 256:
        return f"head_dim={c.head_dim} is no power of two from 16 to 256"
    return None


def _check_flash_attn(c: Qwen3Config, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    """Raises SettingError unless flash-attn runs this model, by a trial on the smallest inputs."""
    key = "engine.attention=flash_attn"
    if device.type != "cuda":
        raise SettingError(f"{key}: needs a CUDA device; use engine.attention=auto")
    if block_size % FlashAttention.BLOCK_MULTIPLE:
        raise SettingError(
            f"{key}: kv.block_size={block_size} must be a multiple of {FlashAttention.BLOCK_MULTIPLE}; "
            "set kv.block_size=256, or use engine.attention=triton"
        )
    if dtype not in FLASH_ATTN_DTYPES:
        raise SettingError(f"{key}: model.dtype must be bfloat16 or float16, not {str(dtype).removeprefix('torch.')}")
    try:
        flash_attn = importlib.import_module("flash_attn")
        q = torch.zeros(1, c.num_attention_heads, c.head_dim, dtype=dtype, device=device)
        cache = torch.zeros(1, block_size, c.num_key_value_heads, c.head_dim, dtype=dtype, device=device)
        one = torch.ones(1, dtype=torch.int32, device=device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        flash_attn.flash_attn_with_kvcache(
            q.unsqueeze(1), cache, cache, cache_seqlens=one, block_table=table, causal=True
        )
        starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
        flash_attn.flash_attn_varlen_func(q, cache, cache, starts, starts, 1, 1, causal=True, block_table=table)
        torch.cuda.synchronize(device)
    except (ImportError, RuntimeError) as error:
        raise SettingError(
            f"{key}: the installed flash-attn cannot run dtype={str(dtype).removeprefix('torch.')}, "
            f"head_dim={c.head_dim}, block_size={block_size}: {error}; use engine.attention=triton"
        ) from error
