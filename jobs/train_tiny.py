"""Make the embedded tiny model again: `python -m jobs.train_tiny` (minutes on one GPU).

It trains a byte-level BPE and a small Qwen3 on the tasks of `jobs.tasks`, writes a checkpoint directory,
loads it back, and prints the share of held-out questions that greedy decoding answers, task by task.
`--evaluate-only` prints that table for the checkpoint that is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from jobs.tasks import SYSTEM, TASKS, Example, bundled_prompts, examples, held_out_examples

ROOT = Path(__file__).resolve().parent
DEFAULT_OUT = ROOT.parent / "nanovllm" / "models" / "tiny"
DEFAULT_PROMPTS = ROOT / "data" / "tiny_prompts.jsonl"

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 2048
CONTEXT = 2048
WIDTHS = (256, 1024)
LONG_EVERY = 4
REPORT_EVERY = 500
CHUNK_ROWS = 1000
OTHER_SYSTEM = "You are a helpful assistant."
WEIGHTS = {"add": 3.0, "subtract": 3.0, "count": 1.5}

PRE_TOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: use system, user or assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


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


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE in which every digit is a token, fitted to training questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, START, STOP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return tokenizer


def _corpus(seed: int) -> Iterator[str]:
    for task in TASKS:
        for example in itertools.islice(examples(task, f"tokenizer:{seed}", held_out=False), 3000):
            yield f"system\n{SYSTEM}"
            yield f"user\n{example.prompt}"
            yield f"assistant\n{example.answer}"
    yield from itertools.repeat(f"system\n{OTHER_SYSTEM}", 1000)


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of config.json, in the form of the released Qwen3 checkpoints."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(STOP),
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 448,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": 5,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.token_to_id(END),
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
    }


class RowMaker:
    """Turns training examples into rows of token ids; answer tokens are stored as their complement."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._ask = self._ids(f"{START}user\n"), self._ids(f"{STOP}\n{START}assistant\n")
        self._close = self._ids("\n")
        self._stop = tokenizer.token_to_id(STOP)
        self._pad = tokenizer.token_to_id(END)
        self._systems = [
            self._ids(f"{START}system\n{text}{STOP}\n") if text else [] for text in (SYSTEM, OTHER_SYSTEM, None)
        ]

    def __call__(self, job: tuple[int, int]) -> np.ndarray:
        """The rows of one chunk, a function of seed, width and chunk number alone."""
        width, chunk = job
        rng = random.Random(f"rows:{self._seed}:{width}:{chunk}")
        turns = self._turns(f"{self._seed}:{width}:{chunk}", rng)
        rows = np.full((CHUNK_ROWS, width), self._pad, dtype=np.int16)
        for row in rows:
            ids = self._conversation(rng, turns, width)
            row[: len(ids)] = ids
        return rows

    def _conversation(self, rng: random.Random, turns: Iterator[list[int]], width: int) -> list[int]:
        """One turn in two rows of five, otherwise as many turns as fit."""
        ids = list(rng.choices(self._systems, weights=(75, 10, 15))[0])
        single = width == WIDTHS[0] and rng.random() < 0.4
        for number in itertools.count():
            turn = next(turns)
            if len(ids) + len(turn) > width or (single and number):
                return ids
            ids += turn
        raise AssertionError("itertools.count does not end")

    def _turns(self, seed: str, rng: random.Random, batch: int = 2000) -> Iterator[list[int]]:
        sources = {task: examples(task, f"rows:{seed}", held_out=False) for task in TASKS}
        weights = [WEIGHTS.get(task, 1.0) for task in TASKS]
        while True:
            tasks = rng.choices(list(TASKS), weights=weights, k=batch)
            yield from self.encode([next(sources[task]) for task in tasks])

    def encode(self, batch: list[Example]) -> Iterator[list[int]]:
        """The token ids of each question and answer as one turn of a conversation."""
        prompts = self._tokenizer.encode_batch_fast([example.prompt for example in batch])
        answers = self._tokenizer.encode_batch_fast([example.answer for example in batch])
        for prompt, answer in zip(prompts, answers, strict=True):
            targets = [~token for token in [*answer.ids, self._stop]]
            yield [*self._ask[0], *prompt.ids, *self._ask[1], *targets, *self._close]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids


def make_pools(tokenizer: Tokenizer, settings: Settings) -> dict[int, torch.Tensor]:
    """The training rows by width; the wide rows hold a quarter of the tokens."""
    maker = RowMaker(tokenizer, settings.seed)
    pools = {}
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as workers:
        for width in WIDTHS:
            rows = settings.rows if width == WIDTHS[0] else settings.rows * WIDTHS[0] // width // (LONG_EVERY - 1)
            jobs = [(width, chunk) for chunk in range(max(1, rows // CHUNK_ROWS))]
            pools[width] = torch.from_numpy(np.concatenate(workers.map(maker, jobs, chunksize=4)))
    return pools


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts for the answer tokens of some rows."""

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor

    def loss(self) -> torch.Tensor:
        """The mean loss of a token."""
        return F.cross_entropy(self.logits, self.labels)

    def wrong_rows(self) -> int:
        """How many rows have an answer token that greedy decoding would miss."""
        return self.rows[self.logits.argmax(-1) != self.labels].unique().numel()

    def lowest_probability(self) -> float:
        """The smallest probability that any true answer token gets."""
        return math.exp(-F.cross_entropy(self.logits, self.labels, reduction="none").max().item())


def predict(model: Qwen3ForCausalLM, rows: torch.Tensor) -> Predictions:
    """Predict every answer token of some rows from the true tokens before it."""
    is_target = rows < 0
    ids = torch.where(is_target, ~rows, rows).long()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = is_target[:, 1:]
    logits = F.linear(hidden[wanted], model.lm_head.weight).float()
    return Predictions(logits, ids[:, 1:][wanted], wanted.nonzero()[:, 0])


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


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How held-out questions of one task went; `lowest` is the least probability of a true answer token."""

    accuracy: float
    lowest: float


class HeldOut:
    """Held-out questions as rows. A row counts as answered when every answer token, its end included, is the
    most probable one after the true tokens before it: exactly when greedy decoding writes the whole answer."""

    def __init__(
        self, tokenizer: Tokenizer, device: torch.device, number: int, seed: str, system: str | None = SYSTEM
    ) -> None:
        maker = RowMaker(tokenizer, 0)
        prefix = tokenizer.encode(f"{START}system\n{system}{STOP}\n").ids if system else []
        self.rows: dict[str, torch.Tensor] = {}
        for task in TASKS:
            turns = [[*prefix, *turn] for turn in maker.encode(held_out_examples(task, number, seed))]
            rows = np.full((len(turns), max(map(len, turns))), tokenizer.token_to_id(END), dtype=np.int16)
            for row, turn in zip(rows, turns, strict=True):
                row[: len(turn)] = turn
            self.rows[task] = torch.from_numpy(rows).to(device)

    @torch.no_grad()
    def results(self, model: Qwen3ForCausalLM) -> dict[str, TaskResult]:
        """The results of a model by task."""
        found = {}
        for task, rows in self.rows.items():
            predictions = predict(model, rows)
            accuracy = 1 - predictions.wrong_rows() / len(rows)
            found[task] = TaskResult(accuracy, predictions.lowest_probability())
        return found


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a complete checkpoint directory in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    stop, end = tokenizer.token_to_id(STOP), tokenizer.token_to_id(END)
    _write_json(out / "config.json", model_config(tokenizer))
    _write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": [stop, end], "pad_token_id": end})
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": STOP,
            "model_max_length": CONTEXT,
            "pad_token": END,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_prompts(path: Path) -> None:
    """Write the bundled held-out prompts, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bundled_prompts()]
    path.write_text("".join(lines), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def evaluate(directory: Path, device: torch.device, number: int) -> dict[str, dict[str, float]]:
    """Held-out results of the checkpoint in a directory: for each column its value by task.

    The columns are accuracy and least probability of a true token, with the system prompt and bare.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    columns: dict[str, dict[str, float]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model: Any = Qwen3ForCausalLM.from_pretrained(directory, dtype=dtype)
        model = model.to(device).eval()
        for system, suffix in ((SYSTEM, ""), (None, " bare")):
            results = HeldOut(tokenizer, device, number, "evaluation", system).results(model)
            columns[f"{name}{suffix}"] = {task: result.accuracy for task, result in results.items()}
            columns[f"{name}{suffix} p"] = {task: result.lowest for task, result in results.items()}
    return columns


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print one line a task and the lowest value of every column."""
    print(f"{'':14s}" + "".join(f"{name:>12s}" for name in columns))
    for task in TASKS:
        print(f"{task:14s}" + "".join(f"{column[task]:12.4f}" for column in columns.values()))
    print(f"{'lowest':14s}" + "".join(f"{min(column.values()):12.4f}" for column in columns.values()), flush=True)


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
    pools = make_pools(tokenizer, settings)
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
    save(model, tokenizer, settings.out)
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
