"""Attention over the paged KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.layers.ops import Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMeta:
    """What a step's attention needs besides q, k and v. Tokens: one for each decode row, the prefills', padding."""

    kv_cache: Tensor
    """[layers, 2, blocks, block size, KV heads, head size]"""
    slot_mapping: Tensor
    """int64 [T]: where each token's KV goes, block * block size + offset; -1 for padding."""
    num_decodes: int
    decode_block_tables: Tensor
    """int32 [decodes, width]"""
    decode_context_lens: Tensor
    """int32 [decodes], the new token included"""
    prefill_block_tables: Tensor
    """int32 [prefills, width]"""
    prefill_query_lens: list[int]
    prefill_context_lens: list[int]
    """The new tokens included."""


class PagedAttention:
    """Stores a layer's new keys and values, then attends to everything that its sequences have stored."""

    def __init__(self, ops: Ops, layer: int, head_size: int) -> None:
        self.ops = ops
        self.layer = layer
        self.scale = head_size**-0.5

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta) -> Tensor:
        """[T, Q, H] from q [T, Q, H] and k, v [T, K, H]; padding tokens get zeros."""
        k_cache, v_cache = meta.kv_cache[self.layer]
        self.ops.store_kv(k, v, k_cache, v_cache, meta.slot_mapping)
        decodes = meta.num_decodes
        end = decodes + sum(meta.prefill_query_lens)
        parts = []
        if decodes:
            parts.append(
                self.ops.paged_decode_attention(
                    q[:decodes], k_cache, v_cache, meta.decode_block_tables, meta.decode_context_lens, self.scale
                )
            )
        if meta.prefill_query_lens:
            parts.append(
                self.ops.paged_prefill_attention(
                    q[decodes:end],
                    k_cache,
                    v_cache,
                    meta.prefill_block_tables,
                    meta.prefill_query_lens,
                    meta.prefill_context_lens,
                    self.scale,
                )
            )
        if end < len(q):
            parts.append(torch.zeros_like(q[end:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
