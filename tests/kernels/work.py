"""A work list on the device, from the same planner that the runner uses."""

import numpy as np
import torch

from kernels.attention_work import DecodeWork
from nanovllm.runner.decode_work import WorkLimits, share_out
from nanovllm.runner.shared_prefixes import PrefixGroup
from tests.kernels.paged import DEVICE, Paged


def limits(kv_heads: int, *, num_programs: int = 8, members_per_item: int = 4) -> WorkLimits:
    return WorkLimits(
        num_kv_heads=kv_heads,
        num_programs=num_programs,
        num_prefix_programs=num_programs,
        members_per_item=members_per_item,
    )


def decode_work(paged: Paged, heads: int, groups: list[PrefixGroup], shape: WorkLimits) -> DecodeWork:
    rows = len(paged.contexts)
    arrays = share_out(np.arange(rows), np.array(paged.contexts), groups, paged.block_size, shape)

    def tensor(values: object) -> torch.Tensor:
        return torch.as_tensor(np.array(values, np.int32), device=DEVICE)

    partials, head_size = shape.partials(rows), paged.k_cache.shape[3]
    return DecodeWork(
        items=tensor(arrays.items),
        num_items=tensor([len(arrays.items)]),
        counters=tensor([0, 0]),
        merges=tensor(arrays.merges),
        num_merges=tensor([len(arrays.merges)]),
        prefix_items=tensor(arrays.prefix_items),
        num_prefix_items=tensor([len(arrays.prefix_items)]),
        members=tensor(arrays.members),
        member_partials=tensor(arrays.member_partials),
        partial_out=torch.full((partials, heads, head_size), torch.nan, device=DEVICE),
        partial_lse=torch.full((partials, heads), torch.nan, device=DEVICE),
        shares_prefixes=bool(groups),
        cuts_rows=True,
    )
