"""What the host does in a decode step: schedule, prepare the batch, commit, record; the device's part is left out."""

import json
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np

from jobs.recorder import ParquetRecorder
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.engine.scheduler import Scheduler
from nanovllm.events import Recorder
from nanovllm.runner.batch import BlockTables, pack
from nanovllm.sampling_params import ResolvedSampling

NUM_SEQUENCES = 256
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
STEPS_PER_ROUND = 50
ROUNDS = 20


class IdleRunner:
    """Prepares every batch as a device would need it, and returns tokens made up beforehand."""

    lookahead = 1

    def __init__(self) -> None:
        self._tables = BlockTables(NUM_SEQUENCES, MAX_MODEL_LEN // BLOCK_SIZE)
        self._tokens = np.random.default_rng(0).integers(1, 30_000, 2 * NUM_SEQUENCES).astype(np.int32)
        self._results: deque[StepResult] = deque()

    def submit(self, plan: Plan) -> None:
        self._tables.update(plan)
        batch = pack(plan, self._tables, BLOCK_SIZE, 1)
        first = plan.step % NUM_SEQUENCES
        tokens = self._tokens[first : first + batch.num_sampled]
        self._results.append(StepResult(token_ids=tokens, padded_batch_size=plan.num_rows))

    def collect(self) -> StepResult:
        return self._results.popleft()


def run() -> None:
    """Both engines run in turn, round by round, so that a machine that changes its speed changes both."""
    with tempfile.TemporaryDirectory() as directory:
        recorder = ParquetRecorder(Path(directory))
        try:
            engines = {"recorder off": _engine(()), "recorder on": _engine((recorder,))}
            times: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(ROUNDS):
                for name, engine in engines.items():
                    times[name] += [_timed_step(engine) for _ in range(STEPS_PER_ROUND)]
        finally:
            recorder.close()
    off, on = (float(np.median(times[name])) for name in times)
    print(f"host work of a decode step: {NUM_SEQUENCES} sequences, block size {BLOCK_SIZE}, microseconds")
    for name, values in times.items():
        quartiles = ", ".join(f"{q:.0f}" for q in np.percentile(values, (25, 50, 75, 99)))
        print(f"  {name:13s} p25, p50, p75, p99: {quartiles}")
    print(f"  recorder's share (difference of the medians): {on - off:.0f}")
    print(json.dumps({"benchmark": "host", "recorder_off_us": round(off, 1), "recorder_on_us": round(on, 1)}))


def _engine(recorders: tuple[Recorder, ...]) -> LLMEngine:
    """An engine in steady decode."""
    rng = np.random.default_rng(1)
    scheduler = Scheduler(
        BlockManager(NUM_SEQUENCES * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE),
        max_num_seqs=NUM_SEQUENCES,
        max_num_batched_tokens=NUM_SEQUENCES * 1024,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(0,),
    )
    engine = LLMEngine(scheduler, IdleRunner(), recorders=recorders)
    for row in range(NUM_SEQUENCES):
        prompt = rng.integers(1, 30_000, rng.integers(100, 1024)).astype(np.int32)
        engine.add(prompt, ResolvedSampling(), row=row)
    for _ in range(20):
        engine.step()
    return engine


def _timed_step(engine: LLMEngine) -> float:
    start = time.perf_counter()
    engine.step()
    return (time.perf_counter() - start) * 1e6
