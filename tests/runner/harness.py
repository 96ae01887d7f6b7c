"""Runs an assembled engine on prompts and keeps every row of logits that was sampled from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from kernels.draws import Draws
from nanovllm.assembly import Assembly, assemble
from nanovllm.config import EngineConfig, KVConfig, LLMConfig, ModelConfig
from nanovllm.engine.llm_engine import SequenceOutput
from nanovllm.events import Recorder, StepEvent
from nanovllm.runner.graph_sizes import GraphSizes
from nanovllm.runner.model_runner import ModelRunner
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
    """(row, position of the sampled token) -> logits; the last computation of each. Empty where graphs run."""

    def run(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, rows: Sequence[int] | None = None
    ) -> list[SequenceOutput]:
        """Generate for all prompts together; outputs in their order. `rows` are their row numbers."""
        engine, intake = self.assembly.engine, self.assembly.intake
        rows = range(len(prompts)) if rows is None else rows
        order = {}
        for prompt, row in zip(prompts, rows, strict=True):
            request = intake.request(prompt, sampling=sampling, row=row)
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
    memory_fraction: float = 0.25,
    prefix_caching: bool = True,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    max_model_len: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    kernels: str = "auto",
    attention: str = "auto",
    enforce_eager: bool = False,
    fixed_sizes: GraphSizes | None = None,
) -> Harness:
    """`memory_fraction` leaves room on a GPU for the tests of other processes.

    `fixed_sizes`: on a CPU, steps run at these sizes, as they do on a GPU, though not as graphs.
    """
    counters = Counters()
    assembly = assemble(
        LLMConfig(
            model=ModelConfig(path=str(path), dtype=dtype),
            kv=KVConfig(
                block_size=block_size,
                num_blocks=num_blocks,
                memory_fraction=memory_fraction,
                prefix_caching=prefix_caching,
            ),
            engine=EngineConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                kernels=kernels,
                attention=attention,
                enforce_eager=enforce_eager,
            ),
            device=device,
            seed=seed,
        ),
        recorders=(counters,),
    )
    if fixed_sizes is not None and device == "cpu":
        _fix_sizes(assembly, max_num_seqs, fixed_sizes)
    logits: dict[tuple[int, int], torch.Tensor] = {}
    if getattr(assembly.engine.runner, "graphs", None) is None or device == "cpu":
        _tap(assembly, logits)
    return Harness(assembly, counters, logits)


def _fix_sizes(assembly: Assembly, max_num_seqs: int, sizes: GraphSizes) -> None:
    runner = assembly.engine.runner
    assert isinstance(runner, ModelRunner)
    assembly.engine.runner = ModelRunner(
        runner._model,
        runner._kv_cache,
        max_num_seqs=max_num_seqs,
        max_model_len=assembly.engine.scheduler.max_model_len,
        work=runner._work,
        graph_sizes=sizes,
        capture=False,
    )


def _tap(assembly: Assembly, logits: dict[tuple[int, int], torch.Tensor]) -> None:
    model = assembly.engine.runner._model  # pyright: ignore[reportAttributeAccessIssue]
    ops = model.lm_head.ops

    def linear_sample(x: torch.Tensor, weight: torch.Tensor, draws: Draws, last_tokens: torch.Tensor) -> torch.Tensor:
        values = ops.linear(x, weight)[: len(draws.position)]
        for row, position, value in zip(draws.by_row().row.tolist(), draws.position.tolist(), values, strict=True):
            logits[row, position] = value.clone()
        return ops.linear_sample(x, weight, draws, last_tokens)

    model.lm_head.ops = SimpleNamespace(linear_sample=linear_sample)
