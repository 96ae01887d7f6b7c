"""Make the embedded tiny model again: `python -m jobs.train_tiny` (minutes on one GPU).

It trains a byte-level BPE and a small Qwen3 on the tasks of `jobs.tasks`, writes a checkpoint directory,
loads it back, and prints the share of held-out questions that greedy decoding answers, task by task.
`--evaluate-only` prints that table for the checkpoint that is there.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from jobs.tasks import bundled_prompts
from jobs.tiny_checkpoint import model_config, save_checkpoint
from jobs.tiny_evaluation import HeldOut, evaluate, predict, print_table
from jobs.tiny_rows import LONG_EVERY, WIDTHS, make_pools
from jobs.tiny_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent
DEFAULT_OUT = ROOT.parent / "nanovllm" / "models" / "tiny"
DEFAULT_PROMPTS = ROOT / "data" / "tiny_prompts.jsonl"
REPORT_EVERY = 500


@dataclass(frozen=True, slots=True)
class Settings:
    """What a training run is made of."""

    out: Path
    prompts: Path
    minutes: float
    steps: int | None
    seed: int
    rows: int
    batch_tokens: int
    learning_rate: float
    eval_examples: int
    compile: bool
    evaluate_only: bool


def train(model: Qwen3ForCausalLM, pools: dict[int, torch.Tensor], settings: Settings, probe: HeldOut) -> None:
    """Fit the model in place until the time or the number of steps is used up."""
    device = next(model.parameters()).device
    optimizer = _optimizer(model, settings)
    shuffle = torch.Generator().manual_seed(settings.seed)
    batches = {width: _batches(pool, settings.batch_tokens // width, shuffle) for width, pool in pools.items()}
    begin = time.perf_counter()
    report = Progress(settings.batch_tokens)
    for step in itertools.count():
        if step == LONG_EVERY:
            begin = time.perf_counter()
        elapsed = (time.perf_counter() - begin) / (60 * settings.minutes)
        done = step / settings.steps if settings.steps else elapsed
        if done >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * done))
        width = WIDTHS[1] if step % LONG_EVERY == LONG_EVERY - 1 else WIDTHS[0]
        rows = next(batches[width]).to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = predict(model, rows).loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report.add(loss.detach())
        if (step + 1) % REPORT_EVERY == 0:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                found = probe.results(model)
            shares = ", ".join(f"{task} {result.accuracy:.2f}" for task, result in found.items())
            print(f"{report.line(step + 1, done)}  {shares}", flush=True)


def _optimizer(model: Qwen3ForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused)


def _batches(pool: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    size = min(size, len(pool))
    while True:
        order = torch.randperm(len(pool), generator=generator).to(pool.device)
        for begin in range(0, len(pool) - size + 1, size):
            yield pool[order[begin : begin + size]]


class Progress:
    """Mean loss and speed since the last line."""

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._losses: list[torch.Tensor] = []
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        self._losses.append(loss)

    def line(self, step: int, done: float) -> str:
        loss = torch.stack(self._losses).mean().item()
        seconds = time.perf_counter() - self._since
        speed = len(self._losses) * self._step_tokens / seconds / 1e6
        self._losses, self._since = [], time.perf_counter()
        return f"step {step:6d}  done {done:4.0%}  loss {loss:.5f}  {speed:.2f} Mtok/s"


def write_prompts(path: Path) -> None:
    """Write the bundled held-out prompts, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bundled_prompts()]
    path.write_text("".join(lines), encoding="utf-8")


def run(settings: Settings) -> None:
    """Train and write the tiny model, then evaluate what was written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()
    if not settings.evaluate_only:
        make(settings)
    clock = time.perf_counter()
    columns = evaluate(settings.out, _device(), settings.eval_examples)
    print(f"{settings.eval_examples} held-out questions a task, evaluated in {time.perf_counter() - clock:.1f} s:")
    print("share answered and least probability p of a true token, with the system prompt and bare")
    print_table(columns)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(settings: Settings) -> None:
    """Train the tokenizer and the model and write them with the bundled prompts."""
    write_prompts(settings.prompts)
    clock = time.perf_counter()
    tokenizer = train_tokenizer(settings.seed)
    pools = make_pools(tokenizer, settings.seed, settings.rows)
    sizes = ", ".join(f"{len(pool)} rows of {width}" for width, pool in pools.items())
    print(f"{tokenizer.get_vocab_size()} tokens, {sizes}, made in {time.perf_counter() - clock:.1f} s", flush=True)
    device = _device()
    torch.manual_seed(settings.seed)
    model: Any = Qwen3ForCausalLM(Qwen3Config(**model_config(tokenizer)))
    model = model.float().to(device)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters on {device}", flush=True)
    if settings.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    pools = {width: pool.to(device) for width, pool in pools.items()}
    train(model, pools, settings, HeldOut(tokenizer, device, 64, "probe"))
    save_checkpoint(model, tokenizer, settings.out)
    print(f"trained and saved after {time.perf_counter() - clock:.1f} s", flush=True)


def parse(arguments: list[str] | None = None) -> Settings:
    """The settings that a command line asks for."""
    parser = argparse.ArgumentParser(description="Train the embedded tiny model and write its checkpoint.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the checkpoint directory to write")
    parser.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS, help="the file of bundled prompts to write")
    parser.add_argument("--minutes", type=float, default=4.5, help="how long to train")
    parser.add_argument("--steps", type=int, help="train for this many steps in place of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1_000_000, help="short training rows to generate")
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="tokens of a training step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--eval-examples", type=int, default=512, help="held-out questions of each task")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the checkpoint that --out holds")
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run(parse())
