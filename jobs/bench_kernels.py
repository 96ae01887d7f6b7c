"""Each kernel alone, in Qwen3-0.6B's shapes: time, bandwidth or FLOP/s, share of the bound; others beside.

Timed as replays of a CUDA graph of several calls on different inputs, so that neither launches nor the L2 count.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.roofline import GPUS
from kernels import reference
from kernels.attention_work import DecodeWork, PrefillWork
from kernels.draws import Draws
from kernels.linear import linear
from kernels.linear_add_norm import linear_add_norm
from kernels.linear_silu_mul import linear_silu_mul
from kernels.norm_rotary_store import norm_rotary_store
from kernels.paged_decode_attention import num_programs, paged_decode_attention
from kernels.paged_prefill_attention import paged_prefill_attention, tokens_per_item
from kernels.rms_norm import add_rms_norm
from kernels.sample import sample
from kernels.shared_prefix_attention import members_per_item, shared_prefix_attention
from kernels.silu_mul import silu_mul
from nanovllm.errors import SettingError
from nanovllm.runner.batch import prefill_items
from nanovllm.runner.decode_work import PROGRAMS_PER_SM, WorkLimits, share_out
from nanovllm.runner.shared_prefixes import PrefixGroup

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 1024, 3072, 16, 8, 128, 151936
DTYPE = torch.bfloat16
BLOCK_SIZE, FLASH_BLOCK_SIZE = 16, 256
L2_BYTES = 60 * 2**20
KV_BYTES = 2 * KV_HEADS * HEAD_SIZE * DTYPE.itemsize
"""Of one token in one layer."""

Calls = list[Callable[[], object]]
"""The same work on different inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one size."""

    name: str
    num_bytes: float
    """That must be read and written."""
    flops: float = 0.0
    ours: Calls
    others: dict[str, Calls] = field(default_factory=dict)


def run() -> None:
    """Print a table and, last, one line of JSON."""
    if not torch.cuda.is_available():
        raise SettingError("jobs.bench kernels: needs a CUDA device, and torch sees none")
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    gpu = GPUS.get(name)
    results = []
    print(f"{'kernel':44s} {'us':>8s} {'TB/s':>6s} {'TFLOP/s':>8s} {'of bound':>8s}   others, us")
    for case in cases(device):
        us = time_us(case.ours)
        bound = max(case.num_bytes / gpu.bytes_per_s, case.flops / gpu.flops_per_s) * 1e6 if gpu else None
        others = {other: time_us(calls) for other, calls in case.others.items()}
        share = f"{bound / us:8.0%}" if bound else f"{'-':>8s}"
        beside = ", ".join(f"{other} {value:.1f}" for other, value in others.items())
        rates = f"{case.num_bytes / us / 1e6:6.2f} {case.flops / us / 1e6:8.0f}"
        print(f"{case.name:44s} {us:8.1f} {rates} {share}   {beside}", flush=True)
        results.append({"kernel": case.name, "us": round(us, 2), "bound_us": bound, "others_us": others})
    print(json.dumps({"benchmark": "kernels", "device": name, "torch": torch.__version__, "kernels": results}))


def time_us(calls: Calls, replays: int = 5) -> float:
    """Median microseconds of one call, from replays of a CUDA graph of them all."""
    calls = calls * max(1, 10 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def cases(device: torch.device) -> Iterator[Case]:
    """All of them, one at a time: their inputs are large."""
    with torch.device(device):
        for rows in (256, 8192):
            yield from _element_wise(rows)
        for rows in (16, 64, 128):
            yield from _products(rows)
        for rows, top_k in ((256, 0), (1024, 0), (256, 20)):
            yield _sampling(rows, top_k)
        yield from _decode_cases()
        yield _prefix_case(1024, 2048)
        for lengths in ([512] * 16, [128] * 64, [8192], [2048] * 4):
            yield _prefill_case([0] * len(lengths), lengths)
        yield _prefill_case([2048] * 64, [64] * 64)


def _copies(num_bytes: float) -> int:
    """Input sets of that size that no cache holds all of."""
    return max(1, min(int(3 * L2_BYTES / num_bytes) + 1, 40))


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def _element_wise(rows: int) -> Iterator[Case]:
    weight = _randn(HIDDEN)
    size = rows * HIDDEN * DTYPE.itemsize
    pairs = [(_randn(rows, HIDDEN), _randn(rows, HIDDEN)) for _ in range(_copies(4 * size))]
    yield Case(
        name=f"add_rms_norm {rows} x {HIDDEN}",
        num_bytes=4 * size,
        ours=[lambda x=x, r=r: add_rms_norm(x, r, weight, 1e-6) for x, r in pairs],
        others={"torch": [lambda x=x, r=r: F.rms_norm(x.add_(r), (HIDDEN,), weight, 1e-6) for x, r in pairs]},
    )
    size = rows * INTERMEDIATE * DTYPE.itemsize
    gates = [_randn(rows, 2 * INTERMEDIATE) for _ in range(_copies(3 * size))]
    yield Case(
        name=f"silu_mul {rows} x {INTERMEDIATE}",
        num_bytes=3 * size,
        ours=[lambda x=x: silu_mul(x) for x in gates],
        others={"torch": [lambda x=x: F.silu(x[:, :INTERMEDIATE]) * x[:, INTERMEDIATE:] for x in gates]},
    )
    num_heads = HEADS + 2 * KV_HEADS
    size = rows * num_heads * HEAD_SIZE * DTYPE.itemsize
    rotary = reference.rotary_table(HEAD_SIZE, 1e6, 4096, torch.device("cuda"))
    k_cache, v_cache = (_randn(rows // BLOCK_SIZE + 1, KV_HEADS, BLOCK_SIZE, HEAD_SIZE) for _ in range(2))
    slots, positions = torch.randperm(rows), torch.randint(0, 4096, (rows,))
    q_weight, k_weight = _randn(HEAD_SIZE), _randn(HEAD_SIZE)
    inputs = [_randn(rows, num_heads, HEAD_SIZE) for _ in range(_copies(2 * size))]
    yield Case(
        name=f"norm_rotary_store {rows} x {num_heads} x {HEAD_SIZE}",
        num_bytes=2 * size + rows * HEAD_SIZE * 4,
        ours=[
            lambda x=x: norm_rotary_store(x, q_weight, k_weight, 1e-6, rotary, positions, k_cache, v_cache, slots)
            for x in inputs
        ],
    )


def _products(rows: int) -> Iterator[Case]:
    """A layer's, of few rows, with what is computed in them or right behind; beside cuBLAS's."""
    heads, norm = HEADS * HEAD_SIZE, torch.ones(HIDDEN, dtype=DTYPE)
    residual = _randn(rows, HIDDEN)

    def case(name: str, columns: int, depth: int, ours: Callable[..., object], theirs: Callable[..., object]) -> Case:
        num_bytes = (columns * depth + rows * (columns + depth)) * DTYPE.itemsize
        x = _randn(rows, depth)
        weights = [_randn(columns, depth) * 0.02 for _ in range(_copies(num_bytes))]
        return Case(
            name=f"{name} {rows} x {depth} x {columns}",
            num_bytes=num_bytes,
            flops=2.0 * rows * columns * depth,
            ours=[lambda w=w: ours(x, w) for w in weights],
            others={"torch": [lambda w=w: theirs(x, w) for w in weights]},
        )

    def add_norm(x: Tensor, weight: Tensor) -> object:
        return linear_add_norm(x, weight, residual, norm, 1e-6)

    def torch_add_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(F.linear(x, weight).add_(residual), (HIDDEN,), norm, 1e-6)

    def torch_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, -1)
        return F.silu(gate).mul_(up)

    yield case("linear", heads + 2 * KV_HEADS * HEAD_SIZE, HIDDEN, linear, F.linear)
    yield case("linear_add_norm", HIDDEN, heads, add_norm, torch_add_norm)
    yield case("linear_silu_mul", 2 * INTERMEDIATE, HIDDEN, linear_silu_mul, torch_silu_mul)
    yield case("linear_add_norm", HIDDEN, INTERMEDIATE, add_norm, torch_add_norm)


def _sampling(rows: int, top_k: int) -> Case:
    logits = [_randn(rows, VOCAB) * 3 for _ in range(2)]
    draws = Draws(
        temperature=torch.full((rows,), 0.6),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), 0.95 if top_k else 1.0),
        min_p=torch.zeros(rows),
        seed=torch.zeros(rows, dtype=torch.int64),
        row=torch.arange(rows),
        sample=torch.zeros(rows, dtype=torch.int32),
        position=torch.zeros(rows, dtype=torch.int32),
    )
    noise = torch.empty(VOCAB).exponential_()
    return Case(
        name=f"sample {rows} x {VOCAB}" + (f", top_k={top_k}, top_p=0.95" if top_k else ""),
        num_bytes=rows * VOCAB * DTYPE.itemsize,
        ours=[lambda x=x: sample(x, draws) for x in logits],
        others={"torch softmax": [lambda x=x: (x.float() / 0.6).softmax(-1).div_(noise).argmax(-1) for x in logits]},
    )


def _cache(num_tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = num_tokens // block_size
    return _randn(blocks, KV_HEADS, block_size, HEAD_SIZE), _randn(blocks, KV_HEADS, block_size, HEAD_SIZE)


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


def _decode_cases() -> Iterator[Case]:
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
        q = _randn(len(contexts), HEADS, HEAD_SIZE)
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
    k_cache, v_cache = (_randn(blocks, FLASH_BLOCK_SIZE, KV_HEADS, HEAD_SIZE) for _ in range(2))
    lens = torch.tensor(contexts, dtype=torch.int32)
    q = _randn(len(contexts), 1, HEADS, HEAD_SIZE)

    def call() -> Tensor:
        return flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lens, block_table=tables, causal=True
        )

    return {"flash_attn, blocks of 256": [call]}


def _prefix_case(members: int, tokens: int) -> Case:
    contexts = [tokens + 64] * members
    tables, blocks = _tables([tokens], BLOCK_SIZE)
    tables = tables.expand(members, -1).contiguous()
    k_cache, v_cache = _cache(blocks * BLOCK_SIZE, BLOCK_SIZE)
    work = decode_work(contexts, [PrefixGroup(np.arange(members), tokens // BLOCK_SIZE)])
    q = _randn(members, HEADS, HEAD_SIZE)
    return Case(
        name=f"shared prefix attention {members} x {tokens}",
        num_bytes=tokens * KV_BYTES,
        flops=4.0 * HEADS * HEAD_SIZE * members * tokens,
        ours=[lambda: shared_prefix_attention(q, k_cache, v_cache, tables, work, HEAD_SIZE**-0.5)],
    )


def _prefill_case(cached: list[int], lengths: list[int], **tuning: object) -> Case:
    contexts = [c + n for c, n in zip(cached, lengths, strict=True)]
    tables, blocks = _tables(contexts, BLOCK_SIZE)
    k_cache, v_cache = _cache(blocks * BLOCK_SIZE, BLOCK_SIZE)
    q = _randn(sum(lengths), HEADS, HEAD_SIZE)
    out = torch.empty_like(q)
    most = tokens_per_item(DTYPE, HEAD_SIZE, HEADS // KV_HEADS)
    if tuning:
        most = tuning["tuning"].rows // (HEADS // KV_HEADS)  # pyright: ignore[reportAttributeAccessIssue]
    items = prefill_items(np.array(lengths), np.array(cached), np.arange(len(lengths)), most)
    work = PrefillWork(
        items=torch.as_tensor(items, device="cuda"),
        bounds=torch.tensor([0, 0, len(items)], dtype=torch.int32),
        counters=torch.zeros(1, dtype=torch.int32),
    )

    def call() -> None:
        work.counters.zero_()
        paged_prefill_attention(q, k_cache, v_cache, tables, work, 0, HEAD_SIZE**-0.5, out, **tuning)  # pyright: ignore[reportArgumentType]

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
    k_cache, v_cache = (_randn(blocks, FLASH_BLOCK_SIZE, KV_HEADS, HEAD_SIZE) for _ in range(2))
    starts, key_starts = (
        torch.tensor([0, *np.cumsum(lens).tolist()], dtype=torch.int32) for lens in (lengths, contexts)
    )
    most = max(lengths), max(contexts)

    def call() -> Tensor:
        return flash_attn.flash_attn_varlen_func(
            q, k_cache, v_cache, starts, key_starts, *most, causal=True, block_table=tables
        )

    return {"flash_attn, blocks of 256": [call]}
