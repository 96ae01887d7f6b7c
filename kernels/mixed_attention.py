"""Attention of a step in which some rows decode and others prefill: both kernels on the device at the same time.

Decoding waits for memory and prefilling for the matrix units, so side by side they take less than one after the other:
136 us instead of 165 where each alone takes 77 and 84 (NOTES.md). For that, both must fit on a multiprocessor: its
registers and shared memory are shared out here. Hopper's kernel for long items fits beside nothing and follows.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from kernels import hopper
from kernels.attention_work import DecodeWork, PrefillWork
from kernels.paged_decode_attention import DecodeTuning, paged_decode_attention
from kernels.paged_prefill_attention import PrefillTuning
from kernels.prefill_attention import prefill_attention
from kernels.shared_prefix_attention import shared_prefix_attention

DECODE = DecodeTuning(programs_per_sm=2, dependent=False, max_registers=168)
PREFILL = PrefillTuning(dependent=False)
"""256 threads beside twice 64 of DECODE, of 168 registers each: 64,512 of 65,536; 128 KiB beside twice 37 of 227."""
BESIDE_HOPPERS = replace(DECODE, programs_per_sm=6)
"""Beside Hopper's kernel for short items, which takes 43,008 registers, two of them fit; the others follow it."""


def mixed_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    decode: DecodeWork,
    prefill: PrefillWork,
    layer: int,
    scale: float,
    out: Tensor,
) -> None:
    """Write to contiguous `out` [T, Q, H] the attention of queries [T, Q, H] over what `decode` and `prefill` say.

    See paged_decode_attention and paged_prefill_attention for the rest.
    """
    caches = k_cache, v_cache, block_tables
    if decode.shares_prefixes:  # whose kernel does not fit beside the others, and is needed first
        shared_prefix_attention(q, *caches, decode, scale)
    if not _side_by_side(q):
        paged_decode_attention(q, *caches, decode, layer, scale, out)
        prefill_attention(q, *caches, prefill, layer, scale, out)
        return
    here, aside = torch.cuda.current_stream(q.device), _side_stream(q.device)
    aside.wait_stream(here)
    beside = BESIDE_HOPPERS if hopper.is_prefill_attention(q, k_cache) else DECODE
    prefill_attention(q, *caches, prefill, layer, scale, out, PREFILL)
    with torch.cuda.stream(aside):
        paged_decode_attention(q, *caches, decode, layer, scale, out, beside)
    here.wait_stream(aside)


def _side_by_side(q: Tensor) -> bool:
    """Whether the kernels, in the sizes above, are made for such queries."""
    return q.is_cuda and q.dtype != torch.float32 and q.shape[2] <= 128


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
