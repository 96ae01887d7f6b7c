"""A kernel to be timed, and how: replays of a CUDA graph of several calls on different inputs.

So neither launches nor the L2 count.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 1024, 3072, 16, 8, 128, 151936
DTYPE = torch.bfloat16
BLOCK_SIZE = 16
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


def copies(num_bytes: float) -> int:
    """Input sets of that size that no cache holds all of."""
    return max(1, min(int(3 * L2_BYTES / num_bytes) + 1, 40))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)
