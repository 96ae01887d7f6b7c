"""The rows of a run by its records and its generations."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.analysis.answers import read_tokens
from jobs.simulation.made_up_prompts import FIRST_OWN_TOKEN, MadeUpPrompts
from jobs.simulation.recorded_rows import EOS, NONE, RecordedRows
from jobs.simulation.recorded_run import RecordedRun
from jobs.usage import UsageError

NOT_FINITE = -1
KEPT_TOKENS = 2**24
"""Prompts of so many tokens in all are made up once for all configurations of a grid: 64 MiB."""
_NO_TOKENS = np.empty(0, np.int32)


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
