"""The rows of a run as a simulation asks for them: prompts that share what the recorded ones shared, and outputs."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.analysis.answers import read_tokens
from jobs.simulation.made_up_prompts import FIRST_OWN_TOKEN, MadeUpPrompts
from jobs.simulation.recorded_run import RecordedRun
from jobs.usage import UsageError

EOS = 2**31 - 1
"""Stands for whatever ended a row: no model has so many tokens."""
NOT_FINITE = -1
KEPT_TOKENS = 2**24
"""Prompts of so many tokens in all are made up once for all configurations of a grid: 64 MiB."""
NONE = -1
_NO_TOKENS = np.empty(0, np.int32)


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
    """int32 [tokens of all prompts], one after the other; none if they are more than KEPT_TOKENS."""

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


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """The rows of a run, and what is known of those that are not among them."""

    rows: RecordedRows
    num_left_out: int
    """Rows that were given up: nobody knows how long they would have become."""
    num_known_outputs: int
    """Rows whose own tokens are known."""


def read_rows(run: RecordedRun) -> ReadRows:
    """UsageError where not one has ended."""
    names = run.requests["finish_reason"].to_numpy()
    row, sample = _column(run.requests, "row"), _column(run.requests, "sample")
    ended = np.flatnonzero(names != "aborted")
    if not len(ended):
        raise UsageError(f"{run.directory}: not one of its rows has ended; there is nothing to simulate")
    ended = ended[np.lexsort((sample[ended], row[ended]))]  # the last of each row counts, if it was done again
    is_last = np.append((row[ended[1:]] != row[ended[:-1]]) | (sample[ended[1:]] != sample[ended[:-1]]), True)
    chosen = ended[is_last]
    table, reasons = run.requests.take(pa.array(chosen)), names[chosen]
    row, sample, lengths = row[chosen], sample[chosen], _column(table, "num_output_tokens")
    starts, tokens, num_known = _outputs(run.directory, row, sample, lengths, reasons)
    arrived, num_prompt_tokens = _column(table, "arrived_ns"), _column(table, "num_prompt_tokens")
    shared_row, shared_tokens = _column(table, "shared_prefix_row", NONE), _column(table, "shared_prefix_tokens")
    prompts = _NO_TOKENS
    if num_prompt_tokens.sum() <= KEPT_TOKENS:
        prompts = MadeUpPrompts(row, num_prompt_tokens, shared_row, shared_tokens).all()
        prompts.flags.writeable = False
    rows = RecordedRows(
        row=row,
        sample=sample,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=lengths,
        arrived_ns=arrived - arrived.min(),
        max_tokens=_limits(lengths, reasons, run.manifest["config"].get("sampling", {}).get("max_tokens")),
        shared_row=shared_row,
        shared_tokens=shared_tokens,
        output_starts=starts,
        output_tokens=tokens,
        prompt_tokens=prompts,
    )
    num_rows = len(run.requests.group_by(["row", "sample"]).aggregate([]))
    return ReadRows(rows=rows, num_left_out=num_rows - len(chosen), num_known_outputs=num_known)


def _column(table: pa.Table, name: str, missing: int = 0) -> np.ndarray:
    column = table[name]
    return (column.fill_null(missing) if column.null_count else column).to_numpy().astype(np.int64)


def _limits(lengths: np.ndarray, reasons: np.ndarray, of_job: int | None) -> np.ndarray:
    others = np.full_like(lengths, NONE) if of_job is None else np.where(lengths <= of_job, of_job, NONE)
    return np.where(reasons == "length", np.maximum(lengths, 1), others)


def _outputs(
    directory: Path, row: np.ndarray, sample: np.ndarray, lengths: np.ndarray, reasons: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """(`output_starts`, `output_tokens`, rows whose own tokens are known)"""
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    tokens = np.repeat(FIRST_OWN_TOKEN + np.arange(len(row), dtype=np.int32), lengths + 1)
    tokens[starts + lengths] = 0
    recorded = read_tokens(directory)
    known = 0
    keys = zip(row.tolist(), sample.tolist(), strict=True)
    for key, start, length in zip(keys, starts.tolist(), lengths.tolist(), strict=True):
        output = recorded.get(key)
        if output is not None and len(output) == length:
            tokens[start : start + length] = output
            known += 1
    tokens[(starts + lengths - 1)[reasons == "stop"]] = EOS
    tokens[(starts + lengths)[reasons == "error"]] = NOT_FINITE
    return starts, tokens, known
