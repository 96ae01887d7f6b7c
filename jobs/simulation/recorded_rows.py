"""The rows of a run as a simulation asks for them: prompts that share what the recorded ones shared, and outputs."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from jobs.simulation.made_up_prompts import MadeUpPrompts

EOS = 2**31 - 1
"""Stands for whatever ended a row: no model has so many tokens."""
NONE = -1


@dataclass(eq=False, kw_only=True)
class RecordedRows:
    """The rows that ended, in the order in which they came to the engine; int64 arrays [rows].

    A prompt is made up so that it has exactly the recorded number of leading tokens in common with the row named in
    `shared_row`, and by that with every other. Outputs are the recorded tokens where the run's generations have them:
    rows with equal prompts may share them too. Without them a row shares its output with nobody.
    """

    row: np.ndarray
    sample: np.ndarray
    num_prompt_tokens: np.ndarray
    num_output_tokens: np.ndarray
    arrived_ns: np.ndarray
    """After the first one."""
    max_tokens: np.ndarray
    """What it had where it ended by length, otherwise the job's if that can be; NONE where the engine alone limits."""
    shared_row: np.ndarray
    """An earlier row whose prompt has leading tokens in common with this one's, or NONE."""
    shared_tokens: np.ndarray
    output_starts: np.ndarray
    """Places in `output_tokens`."""
    output_tokens: np.ndarray
    """int32 [tokens of all outputs, and one more behind each]: the additional one is what the step samples that was
    under way when the row ended, or the one that ended the row because its logits were not finite."""
    prompt_tokens: np.ndarray
    """int32 [tokens of all prompts], one after the other; none where these would be too many."""

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.num_prompt_tokens).tolist()

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def longest_shared(self) -> int:
        """The most tokens that a prompt begins with as an earlier one does."""
        shared = self.num_prompt_tokens if self.sample.any() else self.shared_tokens
        return int(shared.max(initial=0))

    def prompt(self, index: int) -> np.ndarray:
        """int32 token ids, which cannot be written to; asked for in order, by one simulation after the other."""
        if not len(self.prompt_tokens):
            return self._prompts.one(index)
        return self.prompt_tokens[self._ends[index - 1] if index else 0 : self._ends[index]]

    @cached_property
    def _prompts(self) -> MadeUpPrompts:
        return MadeUpPrompts(self.row, self.num_prompt_tokens, self.shared_row, self.shared_tokens)

    # On disk, for processes that simulate side by side: they share the pages

    def save(self, directory: Path) -> None:
        for field in fields(self):
            np.save(directory / f"{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path) -> "RecordedRows":
        """Of what `save` has written there."""
        paths = {field.name: directory / f"{field.name}.npy" for field in fields(cls)}
        mapped = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
        return cls(**{name: np.asarray(array) for name, array in mapped.items()})  # a memmap itself is slow to index
