"""Causal attention of packed queries over the paged KV cache, by the kernel that the device has for it."""

from torch import Tensor

from kernels import hopper
from kernels.attention_work import PrefillWork
from kernels.paged_prefill_attention import PrefillTuning, paged_prefill_attention


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    work: PrefillWork,
    layer: int,
    scale: float,
    out: Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """See paged_prefill_attention, which takes the `tuning`; Hopper's kernel has sizes of its own.

    That one is launched twice: for short items, which leave room for decode attention beside them, so first,
    before that takes all of the device; then for those that see many keys, which need all of a multiprocessor.
    """
    if not hopper.is_prefill_attention(q, k_cache):
        paged_prefill_attention(q, k_cache, v_cache, block_tables, work, layer, scale, out, tuning)
        return
    from kernels.hopper_prefill_attention import LONG, SHORT, hopper_prefill_attention

    for bounds, size in ((work.bounds[1:], SHORT), (work.bounds[:2], LONG)):
        hopper_prefill_attention(q, k_cache, v_cache, block_tables, work.items, bounds, scale, out, size)
