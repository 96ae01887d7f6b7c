"""Runs an assembled engine on prompts and keeps every row of logits that was sampled from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nanovllm.assembly import Assembly, assemble
from nanovllm.config import EngineConfig, KVConfig, LLMConfig, ModelConfig
from nanovllm.engine.llm_engine import SequenceOutput
from nanovllm.events import Recorder, StepEvent
from nanovllm.sampling_params import SamplingParams


@dataclass
class Counters(Recorder):
    """How often what a test wants to provoke has happened."""

    preemptions: int = 0
    cached_tokens: int = 0
    chunked_prefills: int = 0
    mixed_steps: int = 0
    steps: list[StepEvent] = field(default_factory=list)

    def on_step(self, event: StepEvent) -> None:
        plan = event.schedule.plan
        self.steps.append(event)
        self.preemptions += len(event.schedule.preemptions)
        self.cached_tokens += int(event.schedule.cached_tokens.sum())
        self.chunked_prefills += int((~plan.samples).sum())
        self.mixed_steps += plan.phase == "mixed"


@dataclass
class Harness:
    assembly: Assembly
    counters: Counters
    logits: dict[tuple[int, int], torch.Tensor]
    """(row, position of the sampled token) -> logits; the last computation of each."""

    def run(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, rows: Sequence[int] | None = None
    ) -> list[SequenceOutput]:
        """Generate for all prompts together; outputs in their order. `rows` are their row numbers."""
        engine, intake = self.assembly.engine, self.assembly.intake
        rows = range(len(prompts)) if rows is None else rows
        order = {}
        for prompt, row in zip(prompts, rows, strict=True):
            request = intake.request(prompt_token_ids=prompt, sampling=sampling, row=row)
            order[intake.add(request)] = len(order)
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        return sorted(outputs, key=lambda output: order[output.seq_id])


def build(
    path: Path | str,
    *,
    block_size: int = 16,
    num_blocks: int | None = None,
    prefix_caching: bool = True,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Harness:
    counters = Counters()
    assembly = assemble(
        LLMConfig(
            model=ModelConfig(path=str(path), dtype=dtype),
            kv=KVConfig(block_size=block_size, num_blocks=num_blocks, prefix_caching=prefix_caching),
            engine=EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
            device=device,
            seed=seed,
        ),
        recorders=(counters,),
    )
    logits: dict[tuple[int, int], torch.Tensor] = {}
    _tap(assembly, logits)
    return Harness(assembly, counters, logits)


def _tap(assembly: Assembly, logits: dict[tuple[int, int], torch.Tensor]) -> None:
    sampler = assembly.engine.runner._sampler  # pyright: ignore[reportAttributeAccessIssue]
    draw = sampler.draw

    def tapped(values: torch.Tensor, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            logits[int(sampler._row[slot]), position] = values[i].clone()
        return draw(values, slots, positions)

    sampler.draw = tapped
