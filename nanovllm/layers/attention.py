"""Attention over the paged KV cache: what a step tells it, and who computes it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention_work import DecodeWork, PrefillWork


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """A step's rows, decodes first. Tokens: one for each decode, the prefills', padding."""

    num_decodes: int
    slots: Tensor
    """int64 [rows]; rows of the block tables"""
    context_lens: Tensor
    """int32 [rows], the new tokens included"""
    width: int
    """Columns of the block tables that cover the longest row."""
    query_lens: list[int]
    """Of the prefills, as the next two."""
    prefill_context_lens: list[int]
    query_starts: Tensor | None
    """int32 [prefills + 1]: where each one's tokens begin, counted from the first one's, and the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMeta:
    """What a step's attention needs besides q, k and v."""

    kv_cache: Tensor
    """[layers, 2, blocks, KV heads, block size, head size]"""
    block_tables: Tensor
    """int32 [table rows, width], one row for each slot of the engine"""
    slot_mapping: Tensor
    """int64 [T]: where each token's KV goes, block * block size + offset; -1 for padding."""
    rows: AttentionRows | None = None
    """For backends that go by rows."""
    decode_work: DecodeWork | None = None
    """For the Triton kernels, which go by work lists; None where nothing decodes."""
    prefill_work: PrefillWork | None = None
    """Likewise; None where nothing prefills."""


class AttentionBackend(Protocol):
    """Computes attention."""

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        """Write to `out` [T, Q, H] for q [T, Q, H] over a layer's caches [blocks, KV heads, block size, head size].

        What padding tokens get is nobody's business.
        """
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
        """[T, Q, H] of q [T, Q, H], whose keys and values are in the cache."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.backend.attend(q, *self.caches(meta), meta, self.layer, self.scale, out)
        return out
