"""Each kernel alone, in Qwen3-0.6B's shapes: time, bandwidth or FLOP/s, share of the bound; others beside."""

import json
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench_attention import decode_cases, prefill_case, prefix_case
from jobs.bench_case import (
    BLOCK_SIZE,
    DTYPE,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    VOCAB,
    Case,
    copies,
    randn,
    time_us,
)
from jobs.roofline import GPUS
from kernels import reference
from kernels.draws import Draws
from kernels.linear import linear
from kernels.linear_add_norm import linear_add_norm
from kernels.linear_norm_rotary_store import linear_norm_rotary_store
from kernels.linear_sample import linear_sample
from kernels.linear_silu_mul import linear_silu_mul
from kernels.norm_rotary_store import norm_rotary_store
from kernels.rms_norm import add_rms_norm
from kernels.sample import sample
from kernels.silu_mul import silu_mul
from nanovllm.errors import SettingError


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


def cases(device: torch.device) -> Iterator[Case]:
    """All of them, one at a time: their inputs are large."""
    with torch.device(device):
        for rows in (256, 8192):
            yield from _element_wise(rows)
        for rows in (16, 64, 128):
            yield from _products(rows)
        for rows in (2048, 8192):
            yield from _products(rows)
            yield _heads(rows)
        for rows, top_k in ((256, 0), (1024, 0), (256, 20)):
            yield _sampling(rows, top_k)
        for rows in (16, 64, 128, 256, 1024):
            yield _head(rows)
        yield from decode_cases()
        yield prefix_case(1024, 2048)
        for lengths in ([512] * 16, [128] * 64, [8192], [2048] * 4):
            yield prefill_case([0] * len(lengths), lengths)
        yield prefill_case([2048] * 64, [64] * 64)


def _element_wise(rows: int) -> Iterator[Case]:
    weight = randn(HIDDEN)
    size = rows * HIDDEN * DTYPE.itemsize
    pairs = [(randn(rows, HIDDEN), randn(rows, HIDDEN)) for _ in range(copies(4 * size))]
    yield Case(
        name=f"add_rms_norm {rows} x {HIDDEN}",
        num_bytes=4 * size,
        ours=[lambda x=x, r=r: add_rms_norm(x, r, weight, 1e-6) for x, r in pairs],
        others={"torch": [lambda x=x, r=r: F.rms_norm(x.add_(r), (HIDDEN,), weight, 1e-6) for x, r in pairs]},
    )
    size = rows * INTERMEDIATE * DTYPE.itemsize
    gates = [randn(rows, 2 * INTERMEDIATE) for _ in range(copies(3 * size))]
    yield Case(
        name=f"silu_mul {rows} x {INTERMEDIATE}",
        num_bytes=3 * size,
        ours=[lambda x=x: silu_mul(x) for x in gates],
        others={"torch": [lambda x=x: F.silu(x[:, :INTERMEDIATE]) * x[:, INTERMEDIATE:] for x in gates]},
    )
    num_heads = HEADS + 2 * KV_HEADS
    size = rows * num_heads * HEAD_SIZE * DTYPE.itemsize
    rotary = reference.rotary_table(HEAD_SIZE, 1e6, 4096, torch.device("cuda"))
    k_cache, v_cache = (randn(rows // BLOCK_SIZE + 1, KV_HEADS, BLOCK_SIZE, HEAD_SIZE) for _ in range(2))
    slots, positions = torch.randperm(rows), torch.randint(0, 4096, (rows,))
    q_weight, k_weight = randn(HEAD_SIZE), randn(HEAD_SIZE)
    inputs = [randn(rows, num_heads, HEAD_SIZE) for _ in range(copies(2 * size))]
    yield Case(
        name=f"norm_rotary_store {rows} x {num_heads} x {HEAD_SIZE}",
        num_bytes=2 * size + rows * HEAD_SIZE * 4,
        ours=[
            lambda x=x: norm_rotary_store(x, q_weight, k_weight, 1e-6, rotary, positions, k_cache, v_cache, slots)
            for x in inputs
        ],
    )


def _products(rows: int) -> Iterator[Case]:
    """A layer's, with what is computed in them or right behind; beside cuBLAS's."""
    heads, norm = HEADS * HEAD_SIZE, torch.ones(HIDDEN, dtype=DTYPE)
    residual = randn(rows, HIDDEN)

    def case(name: str, columns: int, depth: int, ours: Callable[..., object], theirs: Callable[..., object]) -> Case:
        num_bytes = (columns * depth + rows * (columns + depth)) * DTYPE.itemsize
        x = randn(rows, depth)
        weights = [randn(columns, depth) * 0.02 for _ in range(copies(num_bytes))]
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


def _heads(tokens: int) -> Case:
    """The fused projection with norms, rotation and the cache's write; beside cuBLAS's and our kernel for the rest."""
    num_heads = HEADS + 2 * KV_HEADS
    num_bytes = (num_heads * HEAD_SIZE * HIDDEN + tokens * (HIDDEN + num_heads * HEAD_SIZE)) * DTYPE.itemsize
    x, norm = randn(tokens, HIDDEN), torch.ones(HEAD_SIZE, dtype=DTYPE)
    weights = [randn(num_heads * HEAD_SIZE, HIDDEN) * 0.02 for _ in range(copies(num_bytes))]
    rotary = reference.rotary_table(HEAD_SIZE, 1e6, 4096, torch.device("cuda"))
    k_cache, v_cache = (randn(tokens // BLOCK_SIZE + 1, KV_HEADS, BLOCK_SIZE, HEAD_SIZE) for _ in range(2))
    positions, slots = torch.arange(tokens) % 512, torch.arange(tokens)
    rest = norm, norm, 1e-6, rotary, positions, k_cache, v_cache, slots

    def apart(weight: Tensor) -> Tensor:
        return norm_rotary_store(F.linear(x, weight).unflatten(-1, (-1, HEAD_SIZE)), *rest)

    return Case(
        name=f"linear_norm_rotary_store {tokens} x {HIDDEN} x {num_heads * HEAD_SIZE}",
        num_bytes=num_bytes,
        flops=2.0 * tokens * HIDDEN * num_heads * HEAD_SIZE,
        ours=[lambda w=w: linear_norm_rotary_store(x, w, *rest) for w in weights],
        others={"torch, then our norm_rotary_store": [lambda w=w: apart(w) for w in weights]},
    )


def _sampling(rows: int, top_k: int) -> Case:
    logits = [randn(rows, VOCAB) * 3 for _ in range(2)]
    draws = _draws(rows, top_k)
    noise = torch.empty(VOCAB).exponential_()
    return Case(
        name=f"sample {rows} x {VOCAB}" + (f", top_k={top_k}, top_p=0.95" if top_k else ""),
        num_bytes=rows * VOCAB * DTYPE.itemsize,
        ours=[lambda x=x: sample(x, draws) for x in logits],
        others={"torch softmax": [lambda x=x: (x.float() / 0.6).softmax(-1).div_(noise).argmax(-1) for x in logits]},
    )


def _head(rows: int) -> Case:
    """The LM head and the draw from it; beside cuBLAS's product alone, and with our kernels for the draw."""
    x, draws = randn(rows, HIDDEN), _draws(rows, 0)
    weights = [randn(VOCAB, HIDDEN) * 0.05]
    return Case(
        name=f"linear_sample {rows} x {HIDDEN} x {VOCAB}",
        num_bytes=(VOCAB * HIDDEN + rows * (HIDDEN + VOCAB)) * DTYPE.itemsize,
        flops=2.0 * rows * VOCAB * HIDDEN,
        ours=[lambda w=w: linear_sample(x, w, draws) for w in weights],
        others={
            "torch's product": [lambda w=w: F.linear(x, w) for w in weights],
            "that and our sample": [lambda w=w: sample(F.linear(x, w), draws) for w in weights],
        },
    )


def _draws(rows: int, top_k: int) -> Draws:
    return Draws(
        temperature=torch.full((rows,), 0.6),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), 0.95 if top_k else 1.0),
        min_p=torch.zeros(rows),
        seed=torch.zeros(rows, dtype=torch.int64),
        row=torch.arange(rows),
        sample=torch.zeros(rows, dtype=torch.int32),
        position=torch.zeros(rows, dtype=torch.int32),
    )
