"""The attention kernels, each alone, in Qwen3-0.6B's shapes; flash-attn's beside them."""

import importlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from jobs.bench_case import BLOCK_SIZE, DTYPE, HEAD_SIZE, HEADS, KV_BYTES, KV_HEADS, L2_BYTES, Calls, Case, randn
from kernels.attention_work import LONG_ITEM_KEYS, DecodeWork, PrefillWork
from kernels.launch import num_programs
from kernels.paged_decode_attention import paged_decode_attention
from kernels.paged_prefill_attention import paged_prefill_attention, tokens_per_item
from kernels.prefill_attention import prefill_attention
from kernels.shared_prefix_attention import members_per_item, shared_prefix_attention
from nanovllm.runner.batch import prefill_items
from nanovllm.runner.decode_work import PROGRAMS_PER_SM, WorkLimits, share_out
from nanovllm.runner.shared_prefixes import PrefixGroup

FLASH_BLOCK_SIZE = 256


def _cache(num_tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = num_tokens // block_size
    return randn(blocks, KV_HEADS, block_size, HEAD_SIZE), randn(blocks, KV_HEADS, block_size, HEAD_SIZE)


def _tables(contexts: list[int], block_size: int) -> tuple[Tensor, int]:
    """Blocks in random order for each context, and how many there are."""
    widths = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(widths), dtype=torch.int32)
    tables = torch.zeros(len(contexts), max(widths), dtype=torch.int32)
    for i, (width, end) in enumerate(zip(widths, np.cumsum(widths).tolist(), strict=True)):
        tables[i, :width] = order[end - width : end]
    return tables, sum(widths)


def decode_work(contexts: list[int], groups: list[PrefixGroup], block_size: int = BLOCK_SIZE) -> DecodeWork:
    """As the runner shares it out."""
    device = torch.device("cuda", 0)
    limits = WorkLimits(
        num_kv_heads=KV_HEADS,
        num_programs=num_programs(device) * PROGRAMS_PER_SM,
        num_prefix_programs=num_programs(device),
        members_per_item=members_per_item(DTYPE, HEAD_SIZE, HEADS // KV_HEADS),
    )
    rows = len(contexts)
    arrays = share_out(np.arange(rows), np.array(contexts), groups, block_size, limits)
    partials = limits.partials(rows)

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(np.array(values, np.int32), device=device)

    return DecodeWork(
        items=tensor(arrays.items),
        num_items=tensor([len(arrays.items)]),
        counters=tensor([0]),
        merges=tensor(arrays.merges),
        num_merges=tensor([len(arrays.merges)]),
        prefix_items=tensor(arrays.prefix_items),
        num_prefix_items=tensor([len(arrays.prefix_items)]),
        members=tensor(arrays.members),
        member_partials=tensor(arrays.member_partials),
        partial_out=torch.empty(partials, HEADS, HEAD_SIZE, dtype=torch.float32),
        partial_lse=torch.empty(partials, HEADS, dtype=torch.float32),
        cuts_rows=len(arrays.merges) > 0,
        shares_prefixes=bool(groups),
    )


def decode_cases() -> Iterator[Case]:
    rng = np.random.default_rng(2)
    mixed = rng.integers(100, 1025, 256) + rng.integers(0, 600, 256)
    late = rng.integers(900, 2000, 37)
    for name, contexts in (
        ("256 x 840", [840] * 256),
        ("256 x 2,048", [2048] * 256),
        ("1,024 x 256", [256] * 1024),
        ("64 x 4,096", [4096] * 64),
        ("16 x 8,192", [8192] * 16),
        ("8 x 1,024", [1024] * 8),
        ("256 x 100..1,624", mixed.tolist()),
        ("37 x 900..2,000", late.tolist()),
    ):
        yield decode_case(name, contexts)


def decode_case(name: str, contexts: list[int], **tuning: object) -> Case:
    """`tuning` goes to the kernel."""
    num_tokens = sum(contexts)
    copies = max(1, min(4, int(3 * L2_BYTES / (num_tokens * KV_BYTES)) + 1))
    work, calls = decode_work(contexts, []), []
    for _ in range(copies):
        tables, blocks = _tables(contexts, BLOCK_SIZE)
        k_cache, v_cache = _cache(blocks * BLOCK_SIZE, BLOCK_SIZE)
        q = randn(len(contexts), HEADS, HEAD_SIZE)
        out = torch.empty_like(q)

        def call(q: Tensor = q, k: Tensor = k_cache, v: Tensor = v_cache, t: Tensor = tables, o: Tensor = out) -> None:
            work.counters.zero_()
            paged_decode_attention(q, k, v, t, work, 0, HEAD_SIZE**-0.5, o, **tuning)  # pyright: ignore[reportArgumentType]

        calls.append(call)
    others = {} if tuning else _flash_decode(contexts)
    return Case(name=f"decode attention {name}", num_bytes=num_tokens * KV_BYTES, ours=calls, others=others)


def _flash_decode(contexts: list[int]) -> dict[str, Calls]:
    try:
        flash_attn = importlib.import_module("flash_attn")
    except ImportError:
        return {}
    tables, blocks = _tables(contexts, FLASH_BLOCK_SIZE)
    k_cache, v_cache = (randn(blocks, FLASH_BLOCK_SIZE, KV_HEADS, HEAD_SIZE) for _ in range(2))
    lens = torch.tensor(contexts, dtype=torch.int32)
    q = randn(len(contexts), 1, HEADS, HEAD_SIZE)

    def call() -> Tensor:
        return flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lens, block_table=tables, causal=True
        )

    return {"flash_attn, blocks of 256": [call]}


def prefix_case(members: int, tokens: int) -> Case:
    contexts = [tokens + 64] * members
    tables, blocks = _tables([tokens], BLOCK_SIZE)
    tables = tables.expand(members, -1).contiguous()
    k_cache, v_cache = _cache(blocks * BLOCK_SIZE, BLOCK_SIZE)
    work = decode_work(contexts, [PrefixGroup(np.arange(members), tokens // BLOCK_SIZE)])
    q = randn(members, HEADS, HEAD_SIZE)
    return Case(
        name=f"shared prefix attention {members} x {tokens}",
        num_bytes=tokens * KV_BYTES,
        flops=4.0 * HEADS * HEAD_SIZE * members * tokens,
        ours=[lambda: shared_prefix_attention(q, k_cache, v_cache, tables, work, HEAD_SIZE**-0.5)],
    )


def prefill_case(cached: list[int], lengths: list[int], **tuning: object) -> Case:
    contexts = [c + n for c, n in zip(cached, lengths, strict=True)]
    tables, blocks = _tables(contexts, BLOCK_SIZE)
    k_cache, v_cache = _cache(blocks * BLOCK_SIZE, BLOCK_SIZE)
    q = randn(sum(lengths), HEADS, HEAD_SIZE)
    out = torch.empty_like(q)
    most = tokens_per_item(DTYPE, HEAD_SIZE, HEADS // KV_HEADS)
    if tuning:
        most = tuning["tuning"].rows // (HEADS // KV_HEADS)  # pyright: ignore[reportAttributeAccessIssue]
    items = prefill_items(np.array(lengths), np.array(cached), np.arange(len(lengths)), most)
    num_long = int(np.sum(items[:, 1] + items[:, 3] > LONG_ITEM_KEYS))
    work = PrefillWork(
        items=torch.as_tensor(items, device="cuda"),
        bounds=torch.tensor([0, num_long, len(items)], dtype=torch.int32),
        counters=torch.zeros(1, dtype=torch.int32),
    )

    def call() -> None:
        work.counters.zero_()
        attend = paged_prefill_attention if tuning else prefill_attention
        attend(q, k_cache, v_cache, tables, work, 0, HEAD_SIZE**-0.5, out, **tuning)  # pyright: ignore[reportArgumentType]

    pairs = sum(n * c + n * (n + 1) // 2 for c, n in zip(cached, lengths, strict=True))
    return Case(
        name=f"prefill attention {len(lengths)} x {lengths[0]}" + (f" behind {cached[0]}" if cached[0] else ""),
        num_bytes=2 * q.nbytes + sum(contexts) * KV_BYTES,
        flops=4.0 * HEADS * HEAD_SIZE * pairs,
        ours=[call],
        others={} if tuning else _flash_prefill(q, contexts, lengths),
    )


def _flash_prefill(q: Tensor, contexts: list[int], lengths: list[int]) -> dict[str, Calls]:
    try:
        flash_attn = importlib.import_module("flash_attn")
    except ImportError:
        return {}
    tables, blocks = _tables(contexts, FLASH_BLOCK_SIZE)
    k_cache, v_cache = (randn(blocks, FLASH_BLOCK_SIZE, KV_HEADS, HEAD_SIZE) for _ in range(2))
    starts, key_starts = (
        torch.tensor([0, *np.cumsum(lens).tolist()], dtype=torch.int32) for lens in (lengths, contexts)
    )
    most = max(lengths), max(contexts)

    def call() -> Tensor:
        return flash_attn.flash_attn_varlen_func(
            q, k_cache, v_cache, starts, key_starts, *most, causal=True, block_table=tables
        )

    return {"flash_attn, blocks of 256": [call]}
