"""The implementations of attention that engine.attention chooses from."""

from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from nanovllm.layers.attention import AttentionMeta


class ReferenceAttention:
    """The definition, on any device. Padding gets zeros."""

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        rows = meta.rows
        assert rows is not None
        decodes, end = rows.num_decodes, rows.num_decodes + sum(rows.query_lens)
        tables = meta.block_tables[rows.slots]
        if decodes:
            width = rows.width
            if rows.query_lens:
                width = -(-int(rows.context_lens[:decodes].max()) // k_cache.shape[2])
            lens = rows.context_lens[:decodes]
            args = k_cache, v_cache, tables[:decodes, :width], lens, scale
            out[:decodes] = reference.paged_decode_attention(q[:decodes], *args)
        if rows.query_lens:
            args = k_cache, v_cache, tables[decodes:], rows.query_lens, rows.prefill_context_lens, scale
            out[decodes:end] = reference.paged_prefill_attention(q[decodes:end], *args)
        out[end:].zero_()


class TritonAttention:
    """This project's kernels."""

    def __init__(self) -> None:
        from kernels import (
            mixed_attention,
            paged_decode_attention,
            prefill_attention,
            shared_prefix_attention,
        )

        self._mixed = mixed_attention.mixed_attention
        self._decode = paged_decode_attention.paged_decode_attention
        self._prefix = shared_prefix_attention.shared_prefix_attention
        self._prefill = prefill_attention.prefill_attention

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        caches = k_cache, v_cache, meta.block_tables
        decode, prefill = meta.decode_work, meta.prefill_work
        if decode is not None and prefill is not None:
            self._mixed(q, *caches, decode, prefill, layer, scale, out)
        elif decode is not None:
            if decode.shares_prefixes:
                self._prefix(q, *caches, decode, scale)
            self._decode(q, *caches, decode, layer, scale, out)
        elif prefill is not None:
            self._prefill(q, *caches, prefill, layer, scale, out)


class FlashAttention:
    """The flash-attn package (Dao, arXiv 2307.08691); blocks must be a multiple of 256 tokens."""

    BLOCK_MULTIPLE = 256

    def __init__(self, flash_attn: ModuleType) -> None:
        """`flash_attn`: the imported package."""
        self._decode = flash_attn.flash_attn_with_kvcache
        self._prefill = flash_attn.flash_attn_varlen_func

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, layer: int, scale: float, out: Tensor
    ) -> None:
        rows = meta.rows
        assert rows is not None
        decodes, end = rows.num_decodes, rows.num_decodes + sum(rows.query_lens)
        tables = meta.block_tables.index_select(0, rows.slots)[:, : rows.width].contiguous()
        caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        if decodes:
            out[:decodes] = self._decode(
                q[:decodes].unsqueeze(1),
                *caches,
                cache_seqlens=rows.context_lens[:decodes],
                block_table=tables[:decodes],
                softmax_scale=scale,
                causal=True,
            ).squeeze(1)
        if rows.query_lens:
            lens = rows.context_lens[decodes:]
            out[decodes:end] = self._prefill(
                q[decodes:end],
                *caches,
                cu_seqlens_q=rows.query_starts,
                cu_seqlens_k=torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0)),
                max_seqlen_q=max(rows.query_lens),
                max_seqlen_k=max(rows.prefill_context_lens),
                softmax_scale=scale,
                causal=True,
                block_table=tables[decodes:],
            )
