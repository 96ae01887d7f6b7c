"""Generations and failures on disk: appended as they happen, put into input order at the end."""

import contextlib
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np

from jobs.rows import BadRow

if TYPE_CHECKING:
    import pyarrow as pa

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
SCHEMA_VERSION = "1"
"""Of the Parquet output, in the file's metadata."""

_GROUP_BYTES = 1024 * 1024
"""Appended without waiting for flush(), so that what waits stays small."""
_ROW_GROUP_BYTES = 16 * 1024 * 1024
_ROW_GROUP_ROWS = 16384
_ORDER_CHUNK = 65536
"""Indices that are Python integers at the same time: a million would take 36 MB."""
_INT64 = range(-(2**63), 2**63)
_EXACT_IN_FLOAT64 = range(-(2**53), 2**53 + 1)


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
        self._id_kind = _Kind.NONE
        self._column_kinds = dict.fromkeys(self._keep, _Kind.NONE)
        self._log = _AppendLog(run_dir / PARTIAL_NAME)

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
        self._id_kind |= _kind(generation.id)
        for name, value in columns.items():
            self._column_kinds[name] |= _kind(value)
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
            schema = _parquet_schema(self._id_kind, self._column_kinds)
            output = _replace(self._final, len(order), lambda path: _write_parquet(path, self._log.read(order), schema))
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
        self._log = _AppendLog(run_dir / FAILURES_NAME)

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


class _AppendLog:
    """Lines appended to a file that must not exist yet, each found again by the order in which it came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = array("q")
        self._ends = array("q")
        """Where each line ends in the file; it begins where the one before it ends."""
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._size = 0
        self._failed = False
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)

    @property
    def num_flushed(self) -> int:
        return len(self.rows) - len(self._waiting)

    def append(self, row: int, line: bytes) -> None:
        self._open_file()
        line += b"\n"
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self.rows.append(row)
        self._ends.append(self._size + self._waiting_bytes)
        if self._waiting_bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        file = self._open_file()
        if not self._waiting:
            return
        self._failed = True  # until all of it is done: a signal's exception must not let close() append it again
        try:
            _write_all(file, b"".join(self._waiting))
        except BaseException:
            os.ftruncate(file, self._size)
            raise
        self._size += self._waiting_bytes
        self._waiting.clear()
        self._waiting_bytes = 0
        self._failed = False

    def read(self, order: np.ndarray) -> Iterator[bytes]:
        """The flushed lines in this order, line breaks included."""
        file = self._open_file()
        for first in range(0, len(order), _ORDER_CHUNK):
            for index in order[first : first + _ORDER_CHUNK].tolist():
                begin = self._ends[index - 1] if index else 0
                yield _read_all(file, begin, self._ends[index] - begin)

    def close(self) -> None:
        if self._file is None:
            return
        try:
            if not self._failed:
                self.flush()
        finally:
            os.close(self._file)
            self._file = None

    def _open_file(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path}: is closed")
        if self._failed:
            raise OSError(f"{self.path}: an earlier write failed, so nothing more is written")
        return self._file


# Order and files


def _input_order(rows: array, samples: array) -> np.ndarray:
    """The lines' indices, sorted by (row, sample)."""
    row, sample = np.asarray(rows), np.asarray(samples)
    order = np.lexsort((sample, row))
    for first in range(0, len(order), _ORDER_CHUNK):
        chunk = order[first : first + _ORDER_CHUNK + 1]
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


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # one write, but for a signal or a disk that is about to be full
        rest = rest[os.write(file, rest) :]


def _read_all(file: int, begin: int, size: int) -> bytes:
    data = os.pread(file, size, begin)
    while len(data) < size:
        more = os.pread(file, size - len(data), begin + len(data))
        if not more:
            raise OSError(f"the file of finished rows ends at byte {begin + len(data)}; somebody has shortened it")
        data += more
    return data


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    with path.open("wb", buffering=_GROUP_BYTES) as file:
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


# Parquet


class _Kind(IntFlag):
    """The kinds of values that a column has shown so far."""

    NONE = 0
    STRING = 1
    BOOL = 2
    INTEGER = 4
    LARGE_INTEGER = 8
    """Within 64 bits, but not every such integer is a float."""
    FLOAT = 16
    OTHER = 32


def _kind(value: object) -> _Kind:
    if value is None:
        return _Kind.NONE
    if isinstance(value, str):
        return _Kind.STRING
    if isinstance(value, bool):
        return _Kind.BOOL
    if isinstance(value, int):
        if value in _EXACT_IN_FLOAT64:
            return _Kind.INTEGER
        return _Kind.LARGE_INTEGER if value in _INT64 else _Kind.OTHER
    return _Kind.FLOAT if isinstance(value, float) else _Kind.OTHER


def _arrow_type(kind: _Kind) -> "pa.DataType | None":
    """None for values of several kinds, which become JSON texts."""
    import pyarrow as pa  # 0.2 s that a job without Parquet need not spend

    if kind in (_Kind.NONE, _Kind.STRING):
        return pa.string()
    if kind == _Kind.BOOL:
        return pa.bool_()
    if not kind & ~(_Kind.INTEGER | _Kind.LARGE_INTEGER):
        return pa.int64()
    if not kind & ~(_Kind.INTEGER | _Kind.FLOAT):
        return pa.float64()
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParquetSchema:
    arrow: "pa.Schema"
    ids_as_text: bool
    json_columns: tuple[str, ...]


def _parquet_schema(id_kind: _Kind, column_kinds: Mapping[str, _Kind]) -> _ParquetSchema:
    import pyarrow as pa

    ids_as_text = bool(id_kind & _Kind.STRING)
    kept = {name: _arrow_type(kind) for name, kind in column_kinds.items()}
    arrow = pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            pa.field("id", pa.string() if ids_as_text else pa.int64(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("finish_reason", pa.string(), nullable=False),
            pa.field("num_prompt_tokens", pa.int32(), nullable=False),
            pa.field("num_output_tokens", pa.int32(), nullable=False),
            pa.field("logprobs", pa.null()),
            *(pa.field(name, type or pa.string()) for name, type in kept.items()),
        ],
        metadata={"schema_version": SCHEMA_VERSION},
    )
    json_columns = tuple(name for name, type in kept.items() if type is None)
    return _ParquetSchema(arrow=arrow, ids_as_text=ids_as_text, json_columns=json_columns)


def _write_parquet(path: Path, lines: Iterator[bytes], schema: _ParquetSchema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema.arrow, compression="zstd") as file:
        for group in _groups(lines):
            records = [_parquet_record(record, schema) for record in group]
            file.write_table(pa.Table.from_pylist(records, schema=schema.arrow))


def _groups(lines: Iterator[bytes]) -> Iterator[list[dict[str, object]]]:
    """Decoded lines, in groups that are bounded in rows and in bytes."""
    decode = msgspec.json.Decoder(dict[str, object]).decode
    group: list[dict[str, object]] = []
    num_bytes = 0
    for line in lines:
        group.append(decode(line))
        num_bytes += len(line)
        if len(group) == _ROW_GROUP_ROWS or num_bytes >= _ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _parquet_record(record: dict[str, object], schema: _ParquetSchema) -> dict[str, object]:
    if schema.ids_as_text:
        record["id"] = str(record["id"])
    for name in schema.json_columns:
        if record[name] is not None:
            record[name] = msgspec.json.encode(record[name]).decode("utf-8")
    return record
