"""How many generations give the answer that their prompt carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.tasks import is_correct


@dataclass(frozen=True, slots=True)
class Score:
    """Counts of right answers, in all and as (right, asked) by task."""

    num_correct: int
    num_total: int
    by_task: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The share of right answers; 0 when nothing was asked."""
        return self.num_correct / self.num_total if self.num_total else 0.0


def score(prompts: Iterable[Mapping[str, Any]], generations: Iterable[Mapping[str, Any]]) -> Score:
    """Compare sample 0 of every row with the `answer` of the prompt that has this ordinal.

    Prompts without an `answer` are not scored; a prompt with one but no generation counts as wrong.
    """
    texts = _first_samples(generations)
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        text = texts.pop(row, "")
        if prompt.get("answer") is None:
            continue
        task = str(prompt.get("task", ""))
        asked[task] = asked.get(task, 0) + 1
        right[task] = right.get(task, 0) + is_correct(text, str(prompt["answer"]))
    if texts:
        raise ValueError(f"generation row {min(texts)} has no prompt: score against the input file of the same job")
    by_task = {task: (right[task], asked[task]) for task in sorted(asked)}
    return Score(sum(right.values()), sum(asked.values()), by_task)


def _first_samples(generations: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """The text of sample 0 by row number."""
    texts: dict[int, str] = {}
    for generation in generations:
        if generation.get("sample", 0) != 0:
            continue
        row = int(generation["row"])
        if row in texts:
            raise ValueError(f"generation row {row} comes twice with sample 0: score the output of one job at a time")
        texts[row] = generation.get("text") or ""
    return texts
