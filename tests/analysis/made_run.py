"""Run directories made by the real engine, recorder and writer around a runner that only keeps time."""

import json
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from jobs.recorder import ParquetRecorder
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.engine.scheduler import Scheduler
from nanovllm.sampling_params import ResolvedSampling

Answer = dict[str, Any]
ZERO = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)
EOS = 1


class Clock:
    """Advances by 10 microseconds whenever someone looks, and to where a runner sets it."""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        self.now_ns += 10_000
        return self.now_ns


class TimedRunner:
    """A device that works beside the host: a step takes 2 ms and 20 microseconds a token, graphs pad to 8.

    Graphs of four rows and more run in halves where they have much context.
    """

    def __init__(self, clock: Clock, *, lookahead: int, graphs: bool, seed: int, eos_share: float = 0.02) -> None:
        self.lookahead = lookahead
        self._clock = clock
        self._graphs = graphs
        self._random = np.random.default_rng(seed)
        self._eos_share = eos_share
        self._free_ns = 0
        self._results: deque[tuple[int, StepResult]] = deque()

    def submit(self, plan: Plan) -> None:
        count = int(np.count_nonzero(plan.samples))
        tokens = self._random.integers(EOS + 1, 90, count).astype(np.int32)
        tokens[self._random.random(count) < self._eos_share] = EOS
        real = int(plan.num_tokens.sum())
        graph = self._graphs and plan.phase == "decode"
        padded = -(-real // 8) * 8 if graph else real
        forward_ns = 2_000_000 + 20_000 * padded
        self._clock.now_ns += 100_000
        self._free_ns = max(self._free_ns, self._clock.now_ns) + forward_ns
        result = StepResult(
            token_ids=tokens,
            prepare_ms=0.1,
            forward_ms=forward_ns / 1e6,
            padded_batch_size=padded if graph else 0,
            padded_tokens=padded if graph else 0,
            cuda_graph=graph,
            in_halves=graph and plan.num_rows >= 4 and int(plan.starts.sum()) >= 80,
        )
        self._results.append((self._free_ns, result))

    def collect(self) -> StepResult:
        done_ns, result = self._results.popleft()
        self._clock.now_ns = max(self._clock.now_ns, done_ns)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a run is like; the defaults make one with hits, evictions, preemptions and chunks in a blink."""

    num_rows: int = 60
    num_blocks: int = 40
    block_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 48
    max_tokens: int = 24
    num_prefixes: int = 3
    prefix_tokens: int = 12
    lookahead: int = 1
    graphs: bool = True
    prefix_caching: bool = True
    eos_share: float = 0.02
    seed: int = 0
    ids: Sequence[str] = field(default_factory=tuple)
    flush_s: float = 60.0


def prompts(shape: Shape) -> list[np.ndarray]:
    random = np.random.default_rng(shape.seed)
    prefixes = random.integers(2, 90, (shape.num_prefixes, shape.prefix_tokens)).astype(np.int32)
    tails = random.integers(1, 20, shape.num_rows)
    return [
        np.concatenate([prefixes[row % shape.num_prefixes], random.integers(2, 90, tails[row]).astype(np.int32)])
        for row in range(shape.num_rows)
    ]


def make_run(
    directory: Path,
    shape: Shape | None = None,
    *,
    stops_after: Sequence[int] = (),
    resumed_as: Shape | None = None,
) -> Path:
    """A complete run. After each of `stops_after` steps an attempt is killed; the next one does the rows that are left.

    The last attempt runs with the settings of `resumed_as`. A killed attempt has its block events up to the steps under
    way, and no phase of generating, as SIGKILL leaves it.
    """
    shape = shape or Shape()
    directory.mkdir(parents=True)
    rows = prompts(shape)
    done: dict[int, Answer] = {}
    attempts: list[dict[str, Any]] = []
    progress = (0, 0, 0)
    for number, steps in enumerate([*stops_after, None]):
        settings = shape if steps is not None or resumed_as is None else resumed_as
        progress, attempt = _attempt(directory, settings, rows, done, number, progress, steps)
        attempts.append({**attempt, "engine": _engine(settings)})
    lines = [json.dumps(done[row]) for row in sorted(done)]
    (directory / "generations.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (directory / "failures.jsonl").touch()
    _write_manifest(directory, resumed_as or shape, attempts)
    return directory


def _attempt(
    directory: Path,
    shape: Shape,
    rows: list[np.ndarray],
    done: dict[int, Answer],
    number: int,
    progress: tuple[int, int, int],
    num_steps: int | None,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    first_step, first_seq_id, start_ns = progress
    clock = Clock(start_ns + 100_000_000)
    blocks = BlockManager(shape.num_blocks, shape.block_size, prefix_caching=shape.prefix_caching)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        max_model_len=shape.prefix_tokens + 20 + shape.max_tokens,
        eos_token_ids=(EOS,),
    )
    runner = TimedRunner(
        clock, lookahead=shape.lookahead, graphs=shape.graphs, seed=shape.seed + number, eos_share=shape.eos_share
    )
    engine = LLMEngine(scheduler, runner, clock=clock)
    engine.next_step, engine.next_seq_id = first_step, first_seq_id
    left = deque(row for row in range(len(rows)) if row not in done)
    generate_ns, committed = clock(), 0
    with closing(ParquetRecorder.alone(directory, attempt=number, flush_s=shape.flush_s)) as recorder:
        engine.recorders.append(recorder)
        while (left or engine.has_work()) and committed != num_steps:
            while left and engine.num_waiting < shape.max_num_seqs:
                row = left.popleft()
                name = shape.ids[row] if shape.ids else f"id-{row}"
                engine.add(rows[row], ResolvedSampling(max_tokens=shape.max_tokens), row=row, request_id=name)
            for output in engine.step():
                done[output.row] = {
                    "row": output.row,
                    "sample": 0,
                    "id": output.request_id,
                    "text": "text",
                    "token_ids": output.token_ids,
                    "finish_reason": output.finish_reason,
                    "num_prompt_tokens": output.num_prompt_tokens,
                    "num_output_tokens": len(output.token_ids),
                    "logprobs": None,
                }
            committed += 1
        if num_steps is None:
            for r in engine.recorders:
                r.on_end()
    sealed = num_steps is None
    loaded_ns = start_ns + 80_000_000
    phases = [("load", start_ns + 20_000_000, loaded_ns), ("capture", loaded_ns, loaded_ns + 10_000_000)]
    if sealed:
        end_ns = clock()
        phases += [("generate", generate_ns, end_ns), ("write", end_ns, end_ns + 5_000_000)]
        phases += [("finish", end_ns + 5_000_000, end_ns + 6_000_000)]
    attempt = {
        "attempt": number,
        "started": (ZERO + timedelta(microseconds=start_ns / 1e3)).isoformat(),
        "ended": (ZERO + timedelta(microseconds=phases[-1][2] / 1e3)).isoformat() if sealed else None,
        "phases": [{"name": name, "start_ns": start, "end_ns": end} for name, start, end in phases],
    }
    # What was scheduled but not committed never reached the steps; the next attempt goes on counting from there.
    next_step = first_step + committed
    return (next_step, engine.next_seq_id, clock.now_ns + 50_000_000), attempt


def _engine(shape: Shape) -> dict[str, Any]:
    return {
        "num_kv_blocks": shape.num_blocks,
        "block_size": shape.block_size,
        "max_num_seqs": shape.max_num_seqs,
        "max_num_batched_tokens": shape.max_num_batched_tokens,
        "enable_prefix_caching": shape.prefix_caching,
        "enforce_eager": not shape.graphs,
        "halves": shape.graphs,
    }


def _write_manifest(directory: Path, shape: Shape, attempts: list[dict[str, Any]]) -> None:
    content = {
        "schema_version": 1,
        "status": "complete",
        "exit_code": 0,
        "error": None,
        "clock_zero": ZERO.isoformat(),
        "config": {
            "kv": {"block_size": shape.block_size, "num_blocks": shape.num_blocks},
            "engine": {"max_num_seqs": shape.max_num_seqs, "max_num_batched_tokens": shape.max_num_batched_tokens},
        },
        "command": ["python", "-m", "jobs.generate"],
        "attempts": attempts,
        "device": "cpu",
        "engine": _engine(shape),
        "counts": {"rows": shape.num_rows, "answered": shape.num_rows, "failed": 0, "failed_by_code": {}},
    }
    (directory / "manifest.json").write_text(json.dumps(content, indent=2))
