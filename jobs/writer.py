"""Generations and failures on disk: appended as they happen, put into input order at the end."""

import contextlib
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from jobs.append_log import GROUP_BYTES, ORDER_CHUNK, AppendLog
from jobs.parquet_output import Kind, kind_of, parquet_schema, write_parquet
from jobs.rows import BadRow

FORMATS = ("jsonl", "parquet")
PARTIAL_NAME = "generations.partial.jsonl"
FAILURES_NAME = "failures.jsonl"
OWN_COLUMNS = (
    "row",
    "sample",
    "id",
    "text",
    "token_ids",
    "finish_reason",
    "num_prompt_tokens",
    "num_output_tokens",
    "logprobs",
)
FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sample of one answered row."""

    row: int
    sample: int
    id: str | int
    text: str | None
    """None where there is no tokenizer."""
    token_ids: list[int]
    """Every sampled token, EOS and stop tokens included."""
    finish_reason: str
    """stop or length"""
    num_prompt_tokens: int
    columns: Mapping[str, object] = field(default_factory=dict)
    """The input row's columns that are carried into the output; None where one is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that is complete and on the disk, as read back from it."""

    path: Path
    num_rows: int
    num_bytes: int
    sha256: str


def generations_name(format: str) -> str:
    """The name of the final file in the run directory."""
    return f"generations.{format}"


def check_keep(keep: Sequence[str]) -> None:
    """Raises ValueError for a column that the output cannot carry besides its own."""
    for index, name in enumerate(keep):
        if name in OWN_COLUMNS:
            raise ValueError(
                f"writer.keep={name}: the output has a column of this name; rename the input's, "
                f"the output's own are {', '.join(OWN_COLUMNS)}"
            )
        if name in keep[:index]:
            raise ValueError(f"writer.keep={name}: named twice")


class GenerationWriter:
    """generations.jsonl or generations.parquet of one run, in input order whatever order the rows finish in.

    While the job runs, finished rows can be read in `generations.partial.jsonl`: valid JSONL in the order of
    completion, each line as it will stand in generations.jsonl. `flush()` appends what was written since the last one
    in one unbuffered write, so a row survives the death of the process (not of the machine) once flush has returned;
    `num_flushed` counts those rows. `finish()` writes the final file from it and removes it.

    - Memory: 20 bytes for each row, and one group of rows.
    - A disk error raises OSError out of write, flush or finish. The partial file then holds whole lines up to the last
      flush that succeeded, the writer takes no more, and no final file is left behind.
    - `close()` without `finish()` leaves the partial file, everything written so far in it. The writer is a context
      manager that closes itself.
    - JSON has no NaN: one in a kept column becomes null.

    In Parquet, a kept column is a string, bool, int64 or float64 column when all of its values (nulls aside) are of
    that kind; integers among floats become floats if none of them changes. Any other column is a string column of JSON
    texts. `id` is int64, or a string column as soon as one id is a string: then integers are there as their digits.

    Not for several threads at once.
    """

    def __init__(self, run_dir: Path, format: str = "jsonl", keep: Sequence[str] = ()) -> None:
        if format not in FORMATS:
            raise ValueError(f"writer.format={format}: must be one of {', '.join(FORMATS)}")
        check_keep(keep)
        self._final = run_dir / generations_name(format)
        self._format = format
        self._keep = tuple(keep)
        self._encode = msgspec.json.Encoder().encode
        self._samples = array("i")
        self._id_kind = Kind.NONE
        self._column_kinds = dict.fromkeys(self._keep, Kind.NONE)
        self._log = AppendLog(run_dir / PARTIAL_NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_flushed(self) -> int:
        """Rows that a reader of the partial file finds there."""
        return self._log.num_flushed

    def write(self, generation: Generation) -> None:
        """Takes one finished sample; flush() makes it readable. Each (row, sample) must come once."""
        if generation.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"row {generation.row}: finish_reason={generation.finish_reason!r}: must be one of "
                f"{', '.join(FINISH_REASONS)}; a row that ended otherwise is a failure"
            )
        columns = {name: generation.columns.get(name) for name in self._keep}
        line = self._encode(_record(generation, columns))
        self._samples.append(generation.sample)
        self._id_kind |= kind_of(generation.id)
        for name, value in columns.items():
            self._column_kinds[name] |= kind_of(value)
        self._log.append(generation.row, line)

    def flush(self) -> None:
        """Appends all rows written so far to the partial file."""
        self._log.flush()

    def finish(self) -> OutputFile:
        """Writes the final file in input order and removes the partial one; nothing can be written afterwards.

        The final file appears whole, under its name, and is on the disk when this returns.
        """
        self.flush()
        order = _input_order(self._log.rows, self._samples)
        if self._format == "jsonl":
            output = _replace(self._final, len(order), lambda path: _write_lines(path, self._log.read(order)))
        else:
            schema = parquet_schema(self._id_kind, self._column_kinds)
            output = _replace(self._final, len(order), lambda path: write_parquet(path, self._log.read(order), schema))
        self._log.close()
        self._log.path.unlink()
        return output

    def close(self) -> None:
        """Flushes, unless the disk has failed before, and gives the file back. A second call does nothing."""
        self._log.close()


class FailureWriter:
    """failures.jsonl of one run: there from the start, empty as long as every row is answered.

    Each failure is appended as it happens, in one unbuffered write; `finish()` puts them into row order. Memory: 16
    bytes for each failure. A disk error raises OSError and leaves whole lines. Not for several threads at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._log = AppendLog(run_dir / FAILURES_NAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_failures(self) -> int:
        return self._log.num_flushed

    def write(self, failure: BadRow) -> None:
        """Appends one failure; it is in the file when this returns."""
        record = {
            "file": failure.file,
            "line": failure.line,
            "row": failure.row,
            "id": failure.id,
            "code": failure.code,
            "reason": failure.reason.encode("utf-8", "backslashreplace").decode("utf-8"),
        }
        self._log.append(failure.row, self._encode(record))
        self._log.flush()

    def finish(self) -> OutputFile:
        """Puts the file into row order, on the disk, and closes it."""
        order = np.argsort(np.asarray(self._log.rows), kind="stable")
        output = _replace(self._log.path, len(order), lambda path: _write_lines(path, self._log.read(order)))
        self._log.close()
        return output

    def close(self) -> None:
        """Gives the file back, failures in the order in which they happened. A second call does nothing."""
        self._log.close()


# Order and files


def _input_order(rows: array, samples: array) -> np.ndarray:
    """The lines' indices, sorted by (row, sample)."""
    row, sample = np.asarray(rows), np.asarray(samples)
    order = np.lexsort((sample, row))
    for first in range(0, len(order), ORDER_CHUNK):
        chunk = order[first : first + ORDER_CHUNK + 1]
        again = (np.diff(row[chunk]) == 0) & (np.diff(sample[chunk]) == 0)
        if again.any():
            twice = chunk[int(again.argmax())]
            raise ValueError(f"row {row[twice]}, sample {sample[twice]} was written twice")
    return order


def _replace(final: Path, num_rows: int, write: Callable[[Path], None]) -> OutputFile:
    """Lets `write` make the file under another name; it gets its own name once it is complete and on the disk."""
    beside = final.with_name(f".{final.name}.tmp")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.tell()
        beside.replace(final)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # what fills a disk must not stay on it
        raise
    _sync_directory(final.parent)
    return OutputFile(path=final, num_rows=num_rows, num_bytes=num_bytes, sha256=sha256)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    with path.open("wb", buffering=GROUP_BYTES) as file:
        file.writelines(lines)


# Records


def _record(generation: Generation, columns: dict[str, object]) -> dict[str, object]:
    return {
        "row": generation.row,
        "sample": generation.sample,
        "id": generation.id,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "num_prompt_tokens": generation.num_prompt_tokens,
        "num_output_tokens": len(generation.token_ids),
        "logprobs": None,
        **columns,
    }
