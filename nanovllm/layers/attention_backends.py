"""The implementations of attention that engine.attention chooses from."""

from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from nanovllm.layers.attention import AttentionMeta


class ReferenceAttention:
    """The definition, on any device."""

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        tables = meta.block_tables[meta.decode_slots, : meta.decode_width]
        out.copy_(reference.paged_decode_attention(q, k_cache, v_cache, tables, meta.decode_context_lens, scale))

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, out: Tensor
    ) -> None:
        prefill = meta.prefill
        assert prefill is not None
        width = -(-max(prefill.context_lens) // k_cache.shape[2])
        tables = meta.block_tables[prefill.slots, :width]
        lens = prefill.query_lens, prefill.context_lens
        out.copy_(reference.paged_prefill_attention(q, k_cache, v_cache, tables, *lens, scale))


class TritonAttention:
    """This project's kernels."""

    def __init__(self) -> None:
        from kernels import paged_decode_attention, paged_prefill_attention, shared_prefix_attention

        self._decode = paged_decode_attention.paged_decode_attention
        self._prefix = shared_prefix_attention.shared_prefix_attention
        self._prefill = paged_prefill_attention.paged_prefill_attention

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        work = meta.work
        assert work is not None
        if work.shares_prefixes:
            self._prefix(q, k_cache, v_cache, meta.block_tables, work, scale)
        self._decode(q, k_cache, v_cache, meta.block_tables, work, layer, scale, out)

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, out: Tensor
    ) -> None:
        assert meta.prefill is not None
        self._prefill(q, k_cache, v_cache, meta.block_tables, meta.prefill.items, scale, out)


class FlashAttention:
    """The flash-attn package (Dao, arXiv 2307.08691); pages must be a multiple of 256 tokens."""

    PAGE_MULTIPLE = 256

    def __init__(self, flash_attn: ModuleType) -> None:
        """`flash_attn`: the imported package."""
        self._decode = flash_attn.flash_attn_with_kvcache
        self._prefill = flash_attn.flash_attn_varlen_func

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        attended = self._decode(
            q.unsqueeze(1),
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cache_seqlens=meta.decode_context_lens,
            block_table=meta.block_tables.index_select(0, meta.decode_slots)[:, : meta.decode_width],
            softmax_scale=scale,
            causal=True,
        )
        out.copy_(attended.squeeze(1))

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, out: Tensor
    ) -> None:
        prefill = meta.prefill
        assert prefill is not None
        width = -(-max(prefill.context_lens) // k_cache.shape[2])
        key_starts = _starts(prefill.context_lens_tensor)
        attended = self._prefill(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cu_seqlens_q=prefill.query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=max(prefill.query_lens),
            max_seqlen_k=max(prefill.context_lens),
            softmax_scale=scale,
            causal=True,
            block_table=meta.block_tables.index_select(0, prefill.slots)[:, :width].contiguous(),
        )
        out.copy_(attended)


def _starts(lens: Tensor) -> Tensor:
    """int32 [N + 1]: 0 and the running sums of lens [N]."""
    return torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
