"""Our own engine on a workload: rounds with a new seed each, and what the steps of each took."""

import gc
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jobs.bench_report import Round, StepTotals
from jobs.generate_job import SMALL_MODEL
from jobs.ration import take_rows
from jobs.recorder import ParquetRecorder
from jobs.turns import short_turns
from jobs.workloads import Workload
from nanovllm.assembly import Assembly, Phase, assemble
from nanovllm.config import LLMConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.events import Recorder, RequestEvent, StepEvent
from nanovllm.models.model_config import Qwen3Config
from nanovllm.quiet_gc import collector_kept_out
from nanovllm.sampling_params import ResolvedSampling


class EngineShelf:
    """The engine that was built last, for as long as the same settings are asked for; never two on the device."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, phase: Phase = nullcontext) -> None:
        """What every engine is given besides its settings."""
        self._clock = clock
        self._phase = phase
        self._config: LLMConfig | None = None
        self._assembly: Assembly | None = None

    def engine(self, config: LLMConfig) -> Assembly:
        if self._assembly is None or config != self._config:
            self._clear()
            self._config, self._assembly = config, assemble(config, clock=self._clock, phase=self._phase)
        return self._assembly

    def _clear(self) -> None:
        """Gives the memory back, of which the next engine takes what is free."""
        self._assembly = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def choose_threads(model: Qwen3Config) -> None:
    """As jobs.generate does."""
    if model.num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def run_round(assembly: Assembly, load: Workload, *, seed: int, temperature: float, with_recorder: bool) -> Round:
    """Timed from the prompts' handing over until all tokens are there; the recorder writes to a temporary directory."""
    sampling = [
        ResolvedSampling(temperature=temperature, max_tokens=length, ignore_eos=True, seed=seed)
        for length in load.output_lens
    ]
    totals = _Totals()
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as directory:
        flight = ParquetRecorder.alone(Path(directory)) if with_recorder else None
        recorders: list[Recorder] = [totals] if flight is None else [totals, flight]
        try:
            with _attached(assembly.engine, recorders), short_turns(), collector_kept_out():
                start = time.perf_counter()
                num_tokens = _answer(assembly.engine, load, sampling)
                seconds = time.perf_counter() - start
        finally:
            closing_at = time.perf_counter()
            if flight is not None:
                flight.close()
            close_s = time.perf_counter() - closing_at
    if num_tokens != load.num_output_tokens:
        raise RuntimeError(f"the engine gave {num_tokens} of {load.num_output_tokens} output tokens")
    return Round(
        seed=seed,
        seconds=seconds,
        num_prompt_tokens=load.num_prompt_tokens,
        num_output_tokens=num_tokens,
        recorder=with_recorder,
        recorder_close_s=close_s if with_recorder else None,
        steps=totals.facts(),
    )


def _answer(engine: LLMEngine, load: Workload, sampling: list[ResolvedSampling]) -> int:
    """The number of output tokens. Prompts go in as jobs.generate takes them in: few steps ahead of their turn."""
    pending = deque(zip(range(len(sampling)), load.prompts, sampling, strict=True))
    num_tokens = 0

    def take() -> int | None:
        if not pending:
            return None
        row, prompt, params = pending.popleft()
        engine.add(np.array(prompt, np.int32), params, row=row)
        return len(prompt)

    while pending or engine.has_work():
        take_rows(engine, take)
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    return num_tokens


@contextmanager
def _attached(engine: LLMEngine, recorders: list[Recorder]) -> Iterator[None]:
    before = list(engine.recorders)
    engine.recorders += recorders
    try:
        yield
    finally:
        engine.recorders[:] = before


@dataclass(slots=True)
class _Totals(Recorder):
    num_steps: int = 0
    host_ms: float = 0.0
    forward_ms: float = 0.0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    def on_step(self, event: StepEvent) -> None:
        self.num_steps += 1
        self.host_ms += event.schedule_ms + event.result.prepare_ms + event.postprocess_ms
        self.forward_ms += event.result.forward_ms
        self.num_preemptions += len(event.schedule.preemptions)

    def on_request(self, event: RequestEvent) -> None:
        self.num_cached_tokens += event.num_cached_tokens

    def facts(self) -> StepTotals:
        return StepTotals(
            num_steps=self.num_steps,
            host_ms=self.host_ms,
            forward_ms=self.forward_ms,
            num_preemptions=self.num_preemptions,
            num_cached_tokens=self.num_cached_tokens,
        )
