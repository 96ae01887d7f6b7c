"""What the host does in a step: schedule, commit, record; the device's part, and the runner's, are left out."""

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jobs.recorder import ParquetRecorder
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.engine.scheduler import Scheduler
from nanovllm.events import Recorder
from nanovllm.sampling_params import ResolvedSampling

BLOCK_SIZE = 16
NUM_BLOCKS = 60_000
"""About what a model of 0.6 billion parameters has room for beside its weights on a GPU of 141 GB."""
DECODE_STEPS = 400
ROUNDS = 3


class IdleRunner:
    """Returns tokens made up beforehand, after the time that a device would take; none of them ends a sequence."""

    lookahead = 1

    def __init__(self, max_num_seqs: int, device_ms: float = 0.0) -> None:
        self.idle_ns = 0
        """Time in which the device had no step to work on."""
        self._tokens = np.random.default_rng(0).integers(1, 30_000, 2 * max_num_seqs).astype(np.int32)
        self._max_num_seqs = max_num_seqs
        self._device_ns = int(device_ms * 1e6)
        self._free_ns: int | None = None
        self._results: deque[tuple[StepResult, int]] = deque()

    def submit(self, plan: Plan) -> None:
        now_ns = time.perf_counter_ns()
        if self._free_ns is None:
            self._free_ns = now_ns
        self.idle_ns += max(0, now_ns - self._free_ns)
        self._free_ns = max(now_ns, self._free_ns) + self._device_ns
        first = plan.step % self._max_num_seqs
        tokens = self._tokens[first : first + int(np.count_nonzero(plan.samples))]
        self._results.append((StepResult(token_ids=tokens, padded_batch_size=plan.num_rows), self._free_ns))

    def collect(self) -> StepResult:
        result, end_ns = self._results.popleft()
        if self._device_ns:
            time.sleep(max(0, end_ns - time.perf_counter_ns()) / 1e9)
        return result


Prompts = Callable[[np.random.Generator], list[np.ndarray]]
WarmUp = Callable[[LLMEngine], bool]


def _never(engine: LLMEngine) -> bool:
    return False


def _first_steps(engine: LLMEngine) -> bool:
    return engine.next_step < 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of an engine's life whose steps are alike."""

    name: str
    about: str
    max_num_seqs: int
    prompts: Prompts
    max_tokens: int
    max_model_len: int
    max_num_batched_tokens: int
    device_ms: float
    """What a fast device takes for such a step, with room to spare."""
    ends: Callable[[LLMEngine, int], bool]
    """Whether the phase is over, given the engine and how many steps have been measured."""
    warm_up: WarmUp = _never
    """Whether the next step does not belong to the phase yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Microseconds a step."""

    num_steps: int
    median_us: float
    mean_us: float
    thread_us: float = 0.0
    """CPU time of the recorder's thread, writing included; it needs the interpreter for a part of it."""
    rest_us: float = 0.0
    """Time that the recorder took to write the rest when the steps were over."""
    idle_us: float = 0.0
    """Time in which the device waited for the host."""


def _random_prompts(count: int, shortest: int, longest: int) -> Prompts:
    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        return [rng.integers(1, 30_000, rng.integers(shortest, longest + 1)).astype(np.int32) for _ in range(count)]

    return draw


def _shared_prompts(count: int, num_shared: int, num_own: int) -> Prompts:
    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        shared = rng.integers(1, 30_000, num_shared)
        return [np.concatenate([shared, rng.integers(1, 30_000, num_own)]).astype(np.int32) for _ in range(count)]

    return draw


def _decode(num_sequences: int, shortest: int, longest: int, device_ms: float) -> Phase:
    return Phase(
        name=f"decode_{num_sequences}",
        about=f"decode of {num_sequences:,} sequences",
        max_num_seqs=num_sequences,
        prompts=_random_prompts(num_sequences, shortest, longest),
        max_tokens=3000,
        max_model_len=4096,
        max_num_batched_tokens=num_sequences * 1024,
        device_ms=device_ms,
        warm_up=_first_steps,
        ends=lambda engine, steps: steps >= DECODE_STEPS,
    )


def _prefill(
    name: str, about: str, *, prompts: Prompts, max_tokens: int, max_model_len: int, warm_up: WarmUp = _never
) -> Phase:
    """Lasts as long as prompts wait."""
    return Phase(
        name=name,
        about=about,
        max_num_seqs=1024,
        prompts=prompts,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        max_num_batched_tokens=8192,
        device_ms=10.0,
        warm_up=warm_up,
        ends=lambda engine, steps: engine.num_waiting == 0,
    )


PHASES = (
    _decode(256, 100, 1024, device_ms=1.5),
    _decode(1024, 128, 128, device_ms=3.0),
    _prefill(
        "short",
        "prefill of 8,192 tokens a step, prompts of 512 that end after 8 tokens",
        prompts=_random_prompts(4096, 512, 512),
        max_tokens=8,
        max_model_len=520,
        warm_up=_first_steps,
    ),
    _prefill(
        "shared",
        "admission of 1,024 prompts of 2,048 common tokens and 64 of their own",
        prompts=_shared_prompts(1024, 2048, 64),
        max_tokens=128,
        max_model_len=2240,
    ),
)


def run() -> None:
    """Each phase with the recorder off and on in turn, so that a machine that changes its speed changes both.

    First the host alone, which never waits: there the recorder's thread takes the interpreter from it at every turn.
    Then beside a device that works on one step while the host prepares the next: there only that time counts in which
    the device has nothing to do.
    """
    figures: dict[str, dict[str, object]] = {}
    print(f"host work of a step, microseconds, least of {ROUNDS} rounds; {NUM_BLOCKS:,} blocks of {BLOCK_SIZE} tokens")
    for phase in PHASES:
        rounds = [(_cost(phase), _recorded_cost(phase)) for _ in range(ROUNDS)]
        off = min((without for without, _ in rounds), key=lambda cost: cost.mean_us)
        on = min((with_recorder for _, with_recorder in rounds), key=lambda cost: cost.mean_us)
        idle_off, idle_on = _cost(phase, device_ms=phase.device_ms), _recorded_cost(phase, device_ms=phase.device_ms)
        print(f"  {phase.name}: {phase.about}; {off.num_steps} steps")
        print(f"    recorder off: mean {off.mean_us:.0f}, median {off.median_us:.0f}")
        print(
            f"    recorder on:  mean {on.mean_us:.0f}, median {on.median_us:.0f}; its thread's CPU {on.thread_us:.0f}, "
            f"waited for at the end {on.rest_us:.0f}"
        )
        print(
            f"    beside a device that takes {phase.device_ms} ms a step, it is idle for {idle_off.idle_us:.0f} "
            f"with the recorder off, {idle_on.idle_us:.0f} with it on"
        )
        figures[phase.name] = {
            "off": _rounded(off),
            "on": _rounded(on),
            "device_ms": phase.device_ms,
            "idle_us_off": round(idle_off.idle_us, 1),
            "idle_us_on": round(idle_on.idle_us, 1),
        }
    print(json.dumps({"benchmark": "host", **figures}))


def _rounded(cost: Cost) -> dict[str, object]:
    return {name: round(value, 1) for name, value in asdict(cost).items()}


def _recorded_cost(phase: Phase, device_ms: float = 0.0) -> Cost:
    with tempfile.TemporaryDirectory() as directory:
        recorder = ParquetRecorder.alone(Path(directory))
        try:
            return _cost(phase, recorder, device_ms)
        finally:
            recorder.close()


def _cost(phase: Phase, recorder: ParquetRecorder | None = None, device_ms: float = 0.0) -> Cost:
    runner = IdleRunner(phase.max_num_seqs, device_ms)
    engine = _engine(phase, runner, () if recorder is None else (recorder,))
    while phase.warm_up(engine):
        engine.step()
    idle_start = runner.idle_ns
    other_threads_start = time.process_time_ns() - time.thread_time_ns()
    times: list[int] = []
    while not phase.ends(engine, len(times)):
        start = time.perf_counter_ns()
        engine.step()
        times.append(time.perf_counter_ns() - start)
    start = time.perf_counter_ns()
    if recorder is not None:
        recorder.close()
    rest = time.perf_counter_ns() - start
    other_threads = time.process_time_ns() - time.thread_time_ns() - other_threads_start
    per_step = 1e3 * len(times)
    return Cost(
        num_steps=len(times),
        mean_us=sum(times) / per_step,
        median_us=float(np.median(times)) / 1e3,
        thread_us=other_threads / per_step,
        rest_us=rest / per_step,
        idle_us=(runner.idle_ns - idle_start) / per_step,
    )


def _engine(phase: Phase, runner: IdleRunner, recorders: tuple[Recorder, ...]) -> LLMEngine:
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, BLOCK_SIZE),
        max_num_seqs=phase.max_num_seqs,
        max_num_batched_tokens=phase.max_num_batched_tokens,
        max_model_len=phase.max_model_len,
        eos_token_ids=(0,),
    )
    engine = LLMEngine(scheduler, runner, recorders=recorders)
    sampling = ResolvedSampling(max_tokens=phase.max_tokens)
    for row, prompt in enumerate(phase.prompts(np.random.default_rng(1))):
        engine.add(prompt, sampling, row=row)
    return engine
