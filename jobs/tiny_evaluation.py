"""How well the embedded tiny model answers held-out questions, task by task."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from jobs.tasks import SYSTEM, TASKS, held_out_examples
from jobs.tiny_rows import RowMaker
from jobs.tiny_tokenizer import END, START, STOP


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
