"""The rows of a run as a simulation asks for them: prompts that share what the recorded ones shared, and outputs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jobs.analysis.answers import read_tokens
from jobs.simulation.recorded_run import RecordedRun
from jobs.usage import UsageError

EOS = 2**31 - 1
"""Stands for whatever ended a row: no model has so many tokens."""
NOT_FINITE = -1
FIRST_OWN_TOKEN = 2**30
"""Tokens that were made up are this and more, so that they are none of a recorded output's."""
FILLING = FIRST_OWN_TOKEN - 1
KEPT_TOKENS = 2**24
"""Prompts of so many tokens in all are made up once for all configurations of a grid: 64 MiB."""


@dataclass(frozen=True, slots=True)
class _SharedPrefix:
    """Of a row's prompt with an earlier row's; `row` is -1 where there is none."""

    row: int
    num_tokens: int


class RecordedRows:
    """The rows that ended, in the order in which they came to the engine.

    A prompt is made up so that it has exactly the recorded number of leading tokens in common with the row named in
    `shared_prefix_row`, and by that with every other. Outputs are the recorded tokens where the run's generations have
    them: rows with equal prompts may share them too. Without them a row shares its output with nobody.
    """

    def __init__(self, run: RecordedRun) -> None:
        table = run.requests.to_pydict()
        keys = list(zip(table["row"], table["sample"], strict=True))
        ended = [place for place, reason in enumerate(table["finish_reason"]) if reason != "aborted"]
        last = {keys[place]: place for place in ended}  # of a row that was done again after a crash
        chosen = [last[key] for key in sorted(last)]
        if not chosen:
            raise UsageError(f"{run.directory}: not one of its rows has ended; there is nothing to simulate")
        self.num_left_out = len(set(keys)) - len(chosen)
        """Rows that were given up: nobody knows how long they would have become."""

        def column(name: str, missing: int = 0) -> np.ndarray:
            values = [table[name][place] for place in chosen]
            return np.array([missing if value is None else value for value in values], np.int64)

        self.row = column("row")
        self.sample = column("sample")
        self.num_prompt_tokens = column("num_prompt_tokens")
        self.num_output_tokens = column("num_output_tokens")
        self.arrived_ns = column("arrived_ns") - column("arrived_ns").min()
        self.finish_reason = [table["finish_reason"][place] for place in chosen]
        self.max_tokens = self._limits(run.manifest["config"].get("sampling", {}).get("max_tokens"))
        shared = zip(column("shared_prefix_row", -1).tolist(), column("shared_prefix_tokens").tolist(), strict=True)
        self._shared = [_SharedPrefix(*each) for each in shared]
        self._prompts: dict[int, np.ndarray] = {}
        self._kept: list[np.ndarray | None] = [None] * len(chosen)
        self._keeps = int(self.num_prompt_tokens.sum()) <= KEPT_TOKENS
        self._needed = self._needed_of_others()
        self.output_starts, self.output_tokens, self.num_known_outputs = self._outputs(run.directory)

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def longest_shared(self) -> int:
        """The most tokens that a prompt begins with as an earlier one does."""
        if self.sample.any():
            return int(self.num_prompt_tokens.max())
        return max((shared.num_tokens for shared in self._shared), default=0)

    def prompt(self, index: int) -> np.ndarray:
        """int32 token ids; asked for in order, by one simulation after the other."""
        kept = self._kept[index]
        if kept is not None:
            return kept
        row = int(self.row[index])
        if row not in self._prompts or len(self._prompts[row]) < self.num_prompt_tokens[index]:
            shared = self._shared[index]
            self._prompts[row] = self._made_up(row, int(self.num_prompt_tokens[index]), shared)
        prompt = self._prompts[row]
        if row not in self._needed:
            del self._prompts[row]
        if self._keeps:
            self._kept[index] = prompt
        return prompt

    def _made_up(self, row: int, length: int, shared: _SharedPrefix) -> np.ndarray:
        prompt = np.full(length, FILLING, np.int32)
        known = 0
        if shared.num_tokens:
            if shared.row not in self._prompts:  # a row that never ended
                self._prompts[shared.row] = self._made_up(shared.row, self._needed[shared.row], _SharedPrefix(-1, 0))
            known = shared.num_tokens
            prompt[:known] = self._prompts[shared.row][:known]
        if known < length:
            prompt[known] = FIRST_OWN_TOKEN + row % (2**30 - 1)  # the first token that no earlier prompt has there
        return prompt

    def _needed_of_others(self) -> dict[int, int]:
        """Rows that later ones share a prefix with, and how many tokens at most; a row of several samples too."""
        needed: dict[int, int] = {}
        for shared in self._shared:
            if shared.num_tokens:
                needed[shared.row] = max(needed.get(shared.row, 0), shared.num_tokens)
        for row in self.row[self.sample > 0].tolist():
            needed.setdefault(row, 0)
        return needed

    def _limits(self, job_limit: int | None) -> list[int | None]:
        """Each row's max_tokens: what it had where it ended by length, otherwise the job's, if that can be."""
        lengths = self.num_output_tokens.tolist()
        return [
            max(length, 1) if reason == "length" else job_limit if job_limit and job_limit >= length else None
            for length, reason in zip(lengths, self.finish_reason, strict=True)
        ]

    def _outputs(self, directory: Path) -> tuple[np.ndarray, np.ndarray, int]:
        """(where each row's output begins in the tokens [rows], the tokens, rows whose own tokens are known).

        Behind each output stands one token more: what the step samples that was under way when the row ended, or the
        one that ended the row because its logits were not finite.
        """
        lengths = self.num_output_tokens
        starts = np.cumsum(lengths + 1) - (lengths + 1)
        tokens = np.repeat(FIRST_OWN_TOKEN + np.arange(len(self), dtype=np.int32), lengths + 1)
        tokens[starts + lengths] = 0
        known = 0
        recorded = read_tokens(directory)
        for index, key in enumerate(zip(self.row.tolist(), self.sample.tolist(), strict=True)):
            output, start, length = recorded.get(key), starts[index], lengths[index]
            if output is not None and len(output) == length:
                tokens[start : start + length] = output
                known += 1
            if self.finish_reason[index] == "stop":
                tokens[start + length - 1] = EOS
            elif self.finish_reason[index] == "error":
                tokens[start + length] = NOT_FINITE
        return starts, tokens, known
