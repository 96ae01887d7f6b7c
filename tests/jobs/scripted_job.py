"""jobs.generate over the shadow runner: everything but the model, so that a job takes milliseconds and no torch.

A row's tokens depend on its prompt alone; its text says which attempt answered it.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jobs.config import GenerateConfig
from jobs.figures import Figures
from jobs.generate_job import COMMAND, check, run
from jobs.launch import Run
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine, SequenceOutput
from nanovllm.engine.plan import Plan
from nanovllm.engine.scheduler import Scheduler
from nanovllm.intake import Intake
from nanovllm.models.source import ModelSource
from nanovllm.sampling_params import SamplingParams
from tests.engine.shadow import VOCAB_SIZE, ShadowRunner

BLOCK_SIZE = 4
_ATTEMPT = re.compile(rb'"text":"attempt \d+"')


class _MarkedIntake(Intake):
    attempt = 0

    def text(self, output: SequenceOutput) -> str | None:
        return f"attempt {self.attempt}"


class _Runner(ShadowRunner):
    def submit(self, plan: Plan) -> None:
        super().submit(plan)
        self.used_tables.clear()  # of every step so far, for tests of a few steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedAssembly:
    """As much of an Assembly as the job looks at."""

    engine: LLMEngine
    intake: Intake
    device: str = "shadow"

    def facts(self) -> dict[str, object]:
        return {"dtype": "none"}


def assemble(config: GenerateConfig, run: Run, figures: Figures, source: ModelSource) -> ScriptedAssembly:
    scheduler = Scheduler(
        BlockManager(config.kv.num_blocks or 64, BLOCK_SIZE, prefix_caching=True),
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_model_len=64,
        eos_token_ids=(3,),
    )
    engine = LLMEngine(
        scheduler,
        _Runner(BLOCK_SIZE, lookahead=1),
        recorders=[figures],
        clock=run.clock.now_ns,
        first_step=run.numbers.first_step,
        first_seq_id=run.numbers.first_seq_id,
    )
    intake = _MarkedIntake(engine, None, vocab_size=VOCAB_SIZE, defaults=SamplingParams(max_tokens=9), seed=config.seed)
    intake.attempt = run.manifest.attempt
    return ScriptedAssembly(engine=engine, intake=intake)


SCRIPTED = replace(COMMAND, check=check, run=partial(run, assemble=assemble))
"""The command, to be given to jobs.launch.launch."""


def write_input(path: Path, num_rows: int) -> Path:
    """Rows with one to five tokens, of which every seventh is bad; some prompts and ids repeat."""
    lines = []
    for row in range(num_rows):
        if row % 7 == 3:
            lines.append('{"id": "bad"}')
        else:
            prompt = [(row * 5 + k) % VOCAB_SIZE for k in range(1 + row % 5)]
            lines.append(json.dumps({"id": f"id-{row % 4}", "prompt_token_ids": prompt}))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def words(input_path: Path) -> list[str]:
    """Overrides for a job over these rows."""
    return [
        f"input={input_path}",
        "progress=off",
        "log_level=WARNING",
        "engine.max_num_seqs=4",
        "engine.max_num_batched_tokens=16",
        "recorder.flush_s=0.05",
    ]


def without_attempt(line: bytes) -> bytes:
    """Lines as they would be had one attempt answered them all."""
    return _ATTEMPT.sub(b'"text":"attempt"', line)
