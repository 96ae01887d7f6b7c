"""Generations and failures on disk: logged as they happen, put into input order at the end."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from jobs import batch_output, disk
from jobs.batch_output import BatchForm
from jobs.parquet_output import Kind, count_parquet_rows, kind_of, parquet_schema, write_parquet
from jobs.row_log import RowLog
from jobs.rows import BadRow

FORMATS = ("jsonl", "parquet", batch_output.FORMAT)
PARTIAL_NAME = "generations.partial.jsonl"
PARTIAL_FAILURES_NAME = "failures.partial.jsonl"
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
    url: str | None = None
    """Of a Batch line: which of OpenAI's forms its answer has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that is complete and on the disk, as read back from it."""

    path: Path
    num_rows: int
    num_bytes: int
    sha256: str


def generations_name(format: str) -> str:
    """The name of the final file in the run directory."""
    return f"generations.{'parquet' if format == 'parquet' else 'jsonl'}"


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


class _Writer:
    """What both writers are: a log while the run goes on, a final file made from it at its end.

    `add` and `flush` are a Journal's stage. A disk error raises OSError out of flush or finish: the log then holds
    whole lines up to the last flush that succeeded, takes no more, and no final file is left behind. A context manager
    that closes itself; without `finish` and `remove_log` the log stays.
    """

    log: RowLog

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_flushed(self) -> int:
        """Rows that are acknowledged, those of earlier attempts included."""
        return self.log.num_flushed

    @property
    def num_bytes(self) -> int:
        return self.log.num_bytes

    def remove_log(self) -> None:
        """Once it is written down that the final file is there."""
        self.log.close()
        disk.remove(self.log.path)

    def close(self) -> None:
        """Gives the file back. A second call does nothing."""
        self.log.close()


class GenerationWriter(_Writer):
    """generations.jsonl or generations.parquet of one run, in input order whatever order the rows finish in.

    While the job runs, acknowledged rows can be read in `generations.partial.jsonl`: JSONL in the order of completion,
    each line as it will stand in generations.jsonl but for its checksum (see RowLog). `encode` makes a row's line, in
    the step loop. `finish`, when the journal is closed, writes the final file from the partial one. Memory: one group
    of rows, and a LineIndex while `finish` is at it. JSON has no NaN: one in a kept column becomes null.

    In Parquet, a kept column is a string, bool, int64 or float64 column when all of its values (nulls aside) are of
    that kind; integers among floats become floats if none of them changes. Any other column is a string column of JSON
    texts. `id` is int64, or a string column as soon as one id is a string: then integers are there as their digits.
    """

    def __init__(
        self,
        run_dir: Path,
        format: str = "jsonl",
        keep: Sequence[str] = (),
        *,
        batch: BatchForm | None = None,
        power: bool = True,
        resumed: bool = False,
    ) -> None:
        """`batch`: how openai_batch is written.

        `power`: an acknowledged row survives a loss of power. `resumed`: go on with an earlier attempt's file.
        """
        if format not in FORMATS:
            raise ValueError(f"writer.format={format}: must be one of {', '.join(FORMATS)}")
        assert (format == batch_output.FORMAT) == (batch is not None), "a form for this format, and for it alone"
        check_keep(keep)
        self._batch = batch
        self._final = run_dir / generations_name(format)
        self._format = format
        self._keep = tuple(keep)
        self._encode = msgspec.json.Encoder().encode
        self._id_kind = Kind.NONE
        self._column_kinds = dict.fromkeys(self._keep, Kind.NONE)
        self.log = open_log(run_dir / PARTIAL_NAME, self._see, power=power, resumed=resumed)

    def encode(self, generation: Generation) -> bytes:
        """The line of one finished sample. Each (row, sample) must come once."""
        if generation.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"row {generation.row}: finish_reason={generation.finish_reason!r}: must be one of "
                f"{', '.join(FINISH_REASONS)}; a row that ended otherwise is a failure"
            )
        columns = {name: generation.columns.get(name) for name in self._keep}
        url = {} if self._batch is None else {"url": generation.url}
        line = self._encode(_record(generation, columns) | url)
        self._note_kinds(generation.id, columns)
        return line

    def add(self, lines: Sequence[bytes]) -> None:
        self.log.add(lines)

    def flush(self) -> None:
        """Acknowledges what was added: it is in the partial file, durably."""
        self.log.flush()

    def finish(self) -> OutputFile:
        """Writes the final file in input order, of what is acknowledged.

        It appears whole, under its name, on the disk and with its count verified, when this returns.
        """
        index = self.log.index()
        lines = self.log.read(index)
        if self._batch is not None:
            write = self._batch.write_answers
            return _replace(self._final, index.num_rows, lambda file: write(file, lines), _count_lines)
        num_lines = self.num_flushed
        if self._format == "jsonl":
            return _replace(self._final, num_lines, lambda file: file.writelines(lines), _count_lines)
        schema = parquet_schema(self._id_kind, self._column_kinds)
        return _replace(self._final, num_lines, lambda file: write_parquet(file, lines, schema), count_parquet_rows)

    def _see(self, line: bytes) -> None:
        """Takes over a line of an earlier attempt."""
        record = msgspec.json.decode(line)
        self._note_kinds(record["id"], {name: record[name] for name in self._keep})

    def _note_kinds(self, id: str | int, columns: Mapping[str, object]) -> None:
        self._id_kind |= kind_of(id)
        for name, value in columns.items():
            self._column_kinds[name] |= kind_of(value)


class FailureWriter(_Writer):
    """failures.jsonl of one run, in row order.

    While the job runs, acknowledged failures can be read in `failures.partial.jsonl`, in the order in which they
    happened; everything else is as with GenerationWriter.
    """

    def __init__(self, run_dir: Path, *, power: bool = True, resumed: bool = False) -> None:
        self.codes: Counter[str] = Counter()
        """Of the acknowledged failures."""
        self._final = run_dir / FAILURES_NAME
        self._encode = msgspec.json.Encoder().encode
        self._added: list[str] = []
        self.log = open_log(run_dir / PARTIAL_FAILURES_NAME, self._see, power=power, resumed=resumed)

    def encode(self, failure: BadRow) -> tuple[str, bytes]:
        """The code and the line of one failure."""
        record = {
            "file": failure.file,
            "line": failure.line,
            "row": failure.row,
            "id": failure.id,
            "code": failure.code,
            "reason": failure.reason.encode("utf-8", "backslashreplace").decode("utf-8"),
        }
        return str(failure.code), self._encode(record)

    def add(self, failures: Sequence[tuple[str, bytes]]) -> None:
        self._added += [code for code, _ in failures]
        self.log.add([line for _, line in failures])

    def flush(self) -> None:
        self.log.flush()
        self.codes.update(self._added)
        self._added = []

    def finish(self) -> OutputFile:
        """Writes failures.jsonl as GenerationWriter.finish does its file."""
        lines = self.log.read(self.log.index())
        return _replace(self._final, self.num_flushed, lambda file: file.writelines(lines), _count_lines)

    def finish_batch(self, batch: BatchForm) -> OutputFile:
        """Writes the error file of OpenAI's Batch form beside it."""
        lines = self.log.read(self.log.index())
        errors = self._final.with_name(batch_output.ERRORS_NAME)
        return _replace(errors, self.num_flushed, lambda file: batch.write_errors(file, lines), _count_lines)

    def _see(self, line: bytes) -> None:
        self.codes[msgspec.json.decode(line)["code"]] += 1


# Files


def open_log(path: Path, see: Callable[[bytes], object], *, power: bool, resumed: bool) -> RowLog:
    return RowLog.recover(path, see, power=power) if resumed else RowLog(path, power=power)


def _replace(
    final: Path, num_rows: int, write: Callable[[BinaryIO], object], count: Callable[[Path], int]
) -> OutputFile:
    def check(path: Path) -> OutputFile:
        if (found := count(path)) != num_rows:
            raise OSError(f"{final}: {num_rows} rows were written, but {found} are in the file")
        num_bytes, sha256 = disk.sha256_of(path)
        return OutputFile(path=final, num_rows=num_rows, num_bytes=num_bytes, sha256=sha256)

    return disk.replace(final, write, check)


def _count_lines(path: Path) -> int:
    with open(path, "rb", buffering=0) as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(disk.BUFFER_BYTES), b""))


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
