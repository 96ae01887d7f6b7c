"""Attention over the paged KV cache: what a step tells it, and who computes it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.decode_work import DecodeWork


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillMeta:
    """The rows of a step that prefill."""

    slots: Tensor
    """int64 [prefills]; rows of the block tables."""
    query_lens: list[int]
    context_lens: list[int]
    """The new tokens included."""
    items: Tensor | None
    """int32 [items, ITEM_FIELDS] of kernels/paged_prefill_attention.py"""
    query_starts: Tensor
    """int32 [prefills + 1]: where each row's tokens begin, and the end."""
    context_lens_tensor: Tensor
    """int32 [prefills]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMeta:
    """What a step's attention needs besides q, k and v. Tokens: one for each decode row, the prefills', padding."""

    kv_cache: Tensor
    """[layers, 2, blocks, KV heads, block size, head size]"""
    block_tables: Tensor
    """int32 [table rows, width], one row for each slot of the engine"""
    slot_mapping: Tensor
    """int64 [T]: where each token's KV goes, block * block size + offset; -1 for padding."""
    num_decodes: int
    decode_slots: Tensor
    """int64 [decodes]; rows of the block tables"""
    decode_context_lens: Tensor
    """int32 [decodes], the new token included"""
    decode_width: int
    """Columns of the block tables that cover the longest decode row."""
    work: DecodeWork | None
    """How the Triton kernels share out the decode rows; None where others compute attention, or no row decodes."""
    prefill: PrefillMeta | None


class AttentionBackend(Protocol):
    """Computes attention; caches are one layer's [blocks, KV heads, block size, head size]."""

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        """Write to `out` [decodes, Q, H]."""
        ...

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, out: Tensor
    ) -> None:
        """Write to `out` [prefill tokens, Q, H]."""
        ...


class PagedAttention:
    """Lets every new token of a layer attend to all that its sequence has stored, itself included."""

    def __init__(self, backend: AttentionBackend, layer: int, head_size: int) -> None:
        self.backend = backend
        self.layer = layer
        self.scale = head_size**-0.5

    def caches(self, meta: AttentionMeta) -> tuple[Tensor, Tensor]:
        """The layer's keys and values."""
        cache = meta.kv_cache[self.layer]
        return cache[0], cache[1]

    def __call__(self, q: Tensor, meta: AttentionMeta) -> Tensor:
        """[T, Q, H] of q [T, Q, H], whose keys and values are in the cache; padding of a step with prefills is 0."""
        k_cache, v_cache = self.caches(meta)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decodes = meta.num_decodes
        if decodes:
            self.backend.decode(q[:decodes], k_cache, v_cache, meta, self.layer, self.scale, out[:decodes])
        end = decodes
        if meta.prefill is not None:
            end += sum(meta.prefill.query_lens)
            self.backend.prefill(q[decodes:end], k_cache, v_cache, meta, self.scale, out[decodes:end])
        if end < len(q):
            out[end:].zero_()
        return out
