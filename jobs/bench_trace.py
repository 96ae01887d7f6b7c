"""A profiler's look at a few steps of each workload in full swing: the device's idle share, and what keeps it busy."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from jobs.bench_rounds import EngineShelf
from jobs.workloads import WORKLOADS, Sizes
from nanovllm.config import EngineConfig, LLMConfig, ModelConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import SettingError
from nanovllm.sampling_params import ResolvedSampling

MODEL = "Qwen/Qwen3-0.6B"
STEPS_BEFORE = {"nano": 60, "many": 100, "short": 60, "shared": 60, "long": 60}
"""Steps until a workload is in full swing."""
STEPS = 10
RAMP_STEPS = 3
"""Before these: a device that begins with nothing to do, under a profiler whose first launches are slow."""
TOKENS_COPY = "Memcpy DtoH"
LONG_GAP_US = 10.0
"""Between two kernels of a graph there is less; a longer gap is the host's."""
SHOWN = 14


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of a device's time from its first kernel to the end of its last; microseconds."""

    span: float
    busy: float
    long_gaps: float
    short_gaps: float


def run() -> None:
    """Print a table for each workload and, last, one line of JSON."""
    if not torch.cuda.is_available():
        raise SettingError("jobs.bench trace: needs a CUDA device, and torch sees none")
    shelf, facts = EngineShelf(), {}
    for name in WORKLOADS:
        kernels = _look(shelf, name)
        seen = occupancy((start, end) for _, start, end in kernels)
        print(
            f"{name}: {seen.span / STEPS / 1e3:.3f} ms a step, busy {seen.busy / seen.span:.1%}, gaps over "
            f"{LONG_GAP_US:.0f} us {seen.long_gaps / seen.span:.1%}, shorter ones {seen.short_gaps / seen.span:.1%}"
        )
        totals = by_kernel(kernels)
        for kernel, (count, total) in list(totals.items())[:SHOWN]:
            print(f"  {total / seen.span:6.1%} {count:6d} x {total / count:8.2f} us  {kernel}")
        facts[name] = {
            "step_ms": round(seen.span / STEPS / 1e3, 3),
            "idle": round(1 - seen.busy / seen.span, 4),
            "host_gaps": round(seen.long_gaps / seen.span, 4),
        }
    print(json.dumps({"benchmark": "trace", "device": torch.cuda.get_device_name(), "workloads": facts}))


def _look(shelf: EngineShelf, name: str) -> list[tuple[str, float, float]]:
    """What `_trace` gives; no reference to the engine stays, whose memory the next one takes."""
    engine = _engine(shelf, name)
    for _ in range(STEPS_BEFORE[name]):
        engine.step()
    kernels = _trace(engine)
    engine.abort_all()
    return kernels


def occupancy(intervals: Iterable[tuple[float, float]]) -> Occupancy:
    """Intervals are (start, end) in microseconds, in any order; they may overlap."""
    ordered = sorted(intervals)
    begin, reached = ordered[0]
    busy, gaps = reached - begin, []
    for start, end in ordered[1:]:
        if start > reached:
            gaps.append(start - reached)
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return Occupancy(
        span=reached - begin,
        busy=busy,
        long_gaps=sum(gap for gap in gaps if gap > LONG_GAP_US),
        short_gaps=sum(gap for gap in gaps if gap <= LONG_GAP_US),
    )


def by_kernel(kernels: Iterable[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """How often each ran and for how long in all, the longest first."""
    totals: dict[str, tuple[int, float]] = {}
    for name, start, end in kernels:
        count, total = totals.get(name, (0, 0.0))
        totals[name] = count + 1, total + end - start
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def _engine(shelf: EngineShelf, name: str) -> LLMEngine:
    """With the whole workload waiting."""
    kind = WORKLOADS[name]
    load = kind.build(7, Sizes())
    engine = shelf.engine(
        LLMConfig(
            model=ModelConfig(path=MODEL, load_format="dummy"),
            engine=EngineConfig(
                max_num_seqs=kind.max_num_seqs,
                max_num_batched_tokens=kind.max_num_batched_tokens,
                max_model_len=kind.longest_len(Sizes()) + 1,
            ),
        )
    ).engine
    for row, (prompt, length) in enumerate(zip(load.prompts, load.output_lens, strict=True)):
        sampling = ResolvedSampling(temperature=0.6, max_tokens=length, ignore_eos=True)
        engine.add(np.array(prompt, np.int32), sampling, row=row)
    return engine


def _trace(engine: LLMEngine) -> list[tuple[str, float, float]]:
    """(name, start, end) of what the device did in the next steps; microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(RAMP_STEPS + STEPS):
            engine.step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    kernels = [(event.name[:70], event.time_range.start, event.time_range.end) for event in events]
    return behind_ramp(kernels, RAMP_STEPS, RAMP_STEPS + STEPS)


def behind_ramp(kernels: Iterable[tuple[str, float, float]], first: int, end: int) -> list[tuple[str, float, float]]:
    """What the device did in steps `first` to `end` - 1, and the end of the one before: the copy of its tokens.

    `first` is at least 1.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel[2])
    step_ends = [kernel[2] for kernel in ordered if kernel[0].startswith(TOKENS_COPY)]
    return [kernel for kernel in ordered if step_ends[first - 1] <= kernel[2] <= step_ends[end - 1]]
