"""Input files as a stream of rows: JSONL and Parquet, one file, a glob, or standard input."""

import errno
import glob
import hashlib
import io
import itertools
import os
import stat
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from jobs.rows import MAX_LINE_BYTES, PROMPT_FORMS, BadRow, BadRowCode, InputRow, RowParser
from jobs.usage import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

STANDARD_INPUT = "-"
PARQUET_SUFFIXES = (".parquet", ".pq")
NUM_FIRST_LINES = 10
"""A file none of whose first non-empty lines, as many as these, is an attempt at a JSON object is no JSONL at all."""
MAX_COUNTED_BYTES = 4 * 1024**3
"""Counting the rows of larger JSONL files (seconds for each 4 GiB) is not worth a total in the progress bar."""

_CHUNK_BYTES = 1024 * 1024
_RECORDS_PER_BATCH = 1024
_BOM = b"\xef\xbb\xbf"
_HELD_BYTES = MAX_LINE_BYTES + len(_BOM) + 1
"""Of a line that is too long: enough to see that it is."""
_MAGIC_BYTES = {
    b"\x1f\x8b": "compressed with gzip: decompress it first, or pipe it in: zcat {path} | ... input=-",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it first, or pipe it in: zstdcat {path} | ... input=-",
    b"\xfd7zXZ": "compressed with xz: decompress it first, or pipe it in: xzcat {path} | ... input=-",
    b"BZh": "compressed with bzip2: decompress it first, or pipe it in: bzcat {path} | ... input=-",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "Parquet: give it a name that ends in .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"[": "a JSON array: write one object per line, for instance with jq -c '.[]' {path}",
}


class InputError(UsageError):
    """An input that cannot be read as rows at all; the message names the path and the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """What was read of one input file, for the manifest."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    """Of the file's bytes. Under reader.limit, of a JSONL file's bytes up to the end of the last line read."""


class ByteStream(Protocol):
    """What is read as JSONL: open(path, "rb"), sys.stdin.buffer, io.BytesIO."""

    def read1(self, size: int, /) -> bytes: ...


class RowReader:
    """The rows of an input, in order, good ones and bad ones.

    `source` is a file, a glob (its files sorted by path, directories left out) or `-` for JSONL on standard input. A
    file that exists under exactly this name is not taken for a glob. Names in .parquet and .pq are Parquet, all others
    JSONL. The further settings are those of `RowParser`; `limit` stops after so many rows, bad ones included.

    - Memory does not grow with the input: at most one line (of MAX_LINE_BYTES) and one chunk of 1 MiB are held, or,
      for Parquet, what pyarrow needs for one page of each column used and 1,024 records.
    - A row number counts non-empty lines (not blank ones) and records over all files, bad ones included; lines end in
      \\n alone, \\r before it and a byte order mark at the start of a file are no part of them.
    - Iterating never raises for a row. It raises InputError for a file that is no JSONL at all (see NUM_FIRST_LINES),
      no Parquet, or gone; and OSError where the disk fails.
    - An input without any row is legal: no rows come.

    Each iteration reads from the start (standard input can be read once).
    """

    def __init__(
        self,
        source: str,
        *,
        limit: int | None = None,
        prompt: str | None = None,
        system: str | None = None,
        keep: Sequence[str] = (),
        stdin: ByteStream | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"reader.limit={limit}: must be an integer of at least 1")
        self._parser = RowParser(prompt=prompt, system=system, keep=keep)
        self._paths = _resolve(source)
        self._limit = limit
        self._keep = tuple(keep)
        self._stdin = stdin
        self._files: list[InputFile] = []

    @property
    def paths(self) -> tuple[str, ...]:
        """The files of the input, in reading order; `-` is standard input."""
        return self._paths

    @property
    def files(self) -> tuple[InputFile, ...]:
        """What the latest iteration has read: each file once it is done, and the one at which it was stopped."""
        return tuple(self._files)

    def __iter__(self) -> Iterator[InputRow | BadRow]:
        self._files.clear()
        row = 0
        for path in self._paths:
            remaining = None if self._limit is None else self._limit - row
            with closing(self._rows_of(path, row, remaining)) as rows:
                for item in rows:
                    yield item
                    row += 1
            if row == self._limit:
                return

    def check(self) -> None:
        """Raises InputError for what can be seen of the files without reading them: see check_input."""
        for path in self._paths:
            if path == STANDARD_INPUT:
                _standard_input(self._stdin)
            elif _is_parquet(path):
                with _open_parquet(path) as file:
                    self._check_columns(path, file.schema_arrow)
            elif _is_regular(path):
                self._check_beginning(path)

    def count(self) -> int | None:
        """How many rows an iteration will give; None where only reading tells (pipes) or it takes too long."""
        counts = _row_counts(self._paths)
        total = None if counts is None else sum(counts)
        return total if total is None or self._limit is None else min(total, self._limit)

    def _rows_of(self, path: str, first_row: int, limit: int | None) -> Generator[InputRow | BadRow]:
        if path != STANDARD_INPUT and _is_parquet(path):
            return self._parquet_rows(path, first_row, limit)
        return self._jsonl_rows(path, first_row, limit)

    # JSONL

    def _jsonl_rows(self, path: str, first_row: int, limit: int | None) -> Generator[InputRow | BadRow]:
        with self._open(path) as stream:
            lines = _Lines(stream)
            num_rows = 0
            try:
                for item in _refuse_other_formats(path, self._parsed(path, lines, first_row)):
                    num_rows += 1
                    yield item
                    if num_rows == limit:
                        return
            finally:
                lines.stop()
                self._files.append(
                    InputFile(path=_printable(path), num_rows=num_rows, num_bytes=lines.num_bytes, sha256=lines.sha256)
                )

    def _parsed(self, path: str, lines: "_Lines", first_row: int) -> Iterator[tuple[bytes, InputRow | BadRow]]:
        file, parse = _printable(path), self._parser.from_line
        for row, (number, data) in enumerate(lines, first_row):
            yield data, parse(file, number, row, data)

    @contextmanager
    def _open(self, path: str) -> Iterator[ByteStream]:
        if path == STANDARD_INPUT:
            yield _standard_input(self._stdin)
            return
        with _open_file(path) as stream:
            yield stream

    def _check_beginning(self, path: str) -> None:
        with closing(self._jsonl_rows(path, 0, NUM_FIRST_LINES)) as rows:
            first = list(rows)
        self._files.clear()
        if first and all(isinstance(r, BadRow) and r.code == BadRowCode.SYSTEM_NEEDS_MESSAGES for r in first):
            raise InputError(
                f"reader.system: {_printable(path)} has rows without messages, which take no system message; "
                "leave reader.system out or write the rows as messages"
            )

    # Parquet

    def _parquet_rows(self, path: str, first_row: int, limit: int | None) -> Generator[InputRow | BadRow]:
        file_name = _printable(path)
        num_bytes, sha256 = _digest(path)
        num_rows = 0
        try:
            with _open_parquet(path) as file:
                self._check_columns(path, file.schema_arrow)
                records = _records(path, file, self._parser.columns())
                for record in itertools.islice(records, limit):
                    number, row = num_rows + 1, first_row + num_rows
                    num_rows += 1
                    if isinstance(record, _Unreadable):
                        yield _unreadable_row(file_name, number, row, record)
                    else:
                        yield self._parser.from_record(file_name, number, row, record)
        finally:
            self._files.append(InputFile(path=file_name, num_rows=num_rows, num_bytes=num_bytes, sha256=sha256))

    def _check_columns(self, path: str, schema: "pa.Schema") -> None:
        """Refuses a file in which every row would be bad, or a kept column could not be written."""
        names = ", ".join(schema.names) or "none"
        template = self._parser.template
        if template is None and not {*PROMPT_FORMS, "body"} & set(schema.names):
            raise InputError(
                f"{_printable(path)}: has no column {', '.join(PROMPT_FORMS)}, nor custom_id and body; its columns are "
                f"{names}; reader.prompt=COLUMN takes the prompts from one of them"
            )
        for key, wanted in (("reader.prompt", template.columns if template else ()), ("writer.keep", self._keep)):
            for name in wanted:
                if name not in schema.names:
                    raise InputError(f"{_printable(path)}: has no column {name} ({key}); its columns are {names}")
        for name in self._keep:
            kind = schema.field(name).type
            if not _is_json_type(kind) and not _is_text_castable(kind):
                raise InputError(f"{_printable(path)}: column {name} (writer.keep) is {kind}, which is not JSON")


def check_input(
    source: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    keep: Sequence[str] = (),
    stdin: ByteStream | None = None,
) -> None:
    """Raises InputError for an input that cannot be read, before anything else has been made for the run.

    Cheap: it looks at each file's first lines (JSONL) or footer (Parquet). Refused are a missing or unreadable file, a
    directory, a glob without files, a JSONL file of which none of the first lines is an attempt at a JSON object (CSV,
    compressed files, JSON arrays), a Parquet name without Parquet in it or without the columns that prompts and
    writer.keep need. Standard input and other pipes are not read: RowReader raises the same errors when it reads them.
    Settings that contradict each other raise ValueError.
    """
    RowReader(source, prompt=prompt, system=system, keep=keep, stdin=stdin).check()


# Paths


def _resolve(source: str) -> tuple[str, ...]:
    """The files that `source` stands for, all of them there; raises InputError."""
    if source == STANDARD_INPUT:
        return (STANDARD_INPUT,)
    path = os.path.expanduser(source)
    if not os.path.exists(path) and glob.has_magic(path):
        return _matches(source, path)
    _check_path(path, "")
    return (path,)


def _matches(source: str, pattern: str) -> tuple[str, ...]:
    found = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not found:
        raise InputError(f"input={_printable(source)}: no file matches; the working directory is {os.getcwd()}")
    for path in found:
        _check_path(path, f" (matched by {_printable(source)})")
    return tuple(found)


def _check_path(path: str, origin: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _cannot_open(path, error, origin) from None
    if stat.S_ISDIR(mode):
        raise InputError(
            f"input={_printable(path)}: is a directory{origin}; name a file or a glob such as "
            f"'{_printable(os.path.join(path, '*.jsonl'))}'"
        )
    if not os.access(path, os.R_OK):
        raise _cannot_open(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), origin)


def _cannot_open(path: str, error: Exception, origin: str = "") -> InputError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    cure = f"; the working directory is {os.getcwd()}" if not os.path.isabs(path) else ""
    return InputError(f"input={_printable(path)}: {reason.lower()}{origin}{cure}")


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(PARQUET_SUFFIXES)


def _is_regular(path: str) -> bool:
    return os.path.isfile(path)


def _printable(path: str) -> str:
    """The path as text that JSON can hold; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# Bytes and lines


def _open_file(path: str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _cannot_open(path, error) from None


def _standard_input(stdin: ByteStream | None) -> ByteStream:
    if stdin is not None:
        return stdin
    if sys.stdin is None:
        raise InputError("input=-: there is no standard input; name a file")
    return cast(io.BufferedReader, sys.stdin.buffer)


def _digest(path: str) -> tuple[int, str]:
    """(bytes, sha256) of a whole file."""
    with _open_file(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


class _Lines:
    """The non-empty lines of a byte stream as (line number, bytes), with count and hash of the bytes gone through.

    A line longer than MAX_LINE_BYTES comes without its end, but still longer than that, so that it is refused.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.num_bytes = 0
        self._stream = stream
        self._hash = hashlib.sha256()
        self._lines = self._split()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return self._lines

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def stop(self) -> None:
        """Counts what was gone through up to the end of the latest line, and nothing behind it."""
        self._lines.close()

    def _split(self) -> Generator[tuple[int, bytes]]:
        line = _OpenLine()
        number = 0
        while chunk := self._stream.read1(_CHUNK_BYTES):
            start = 0
            try:
                while (end := chunk.find(b"\n", start)) >= 0:
                    number += 1
                    data = line.closed(chunk[start:end])
                    start = end + 1
                    if number == 1:
                        data = data.removeprefix(_BOM)
                    if not _is_blank(data):
                        yield number, data
                line.add(chunk[start:])
                start = len(chunk)
            finally:
                self._count(chunk if start == len(chunk) else chunk[:start])
        data = line.closed(b"")
        if number == 0:
            data = data.removeprefix(_BOM)
        if not _is_blank(data):
            yield number + 1, data

    def _count(self, gone_through: bytes) -> None:
        self.num_bytes += len(gone_through)
        self._hash.update(gone_through)


def _is_blank(line: bytes) -> bool:
    return not line or (line.isspace() and len(line) <= MAX_LINE_BYTES)


class _OpenLine:
    """The beginning of a line whose end has not been read yet; never holds more than _HELD_BYTES."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._room = _HELD_BYTES

    def add(self, piece: bytes) -> None:
        if piece and self._room:
            self._pieces.append(piece[: self._room])
            self._room -= len(self._pieces[-1])

    def closed(self, end: bytes) -> bytes:
        """The whole line, without its line break; the next one is begun."""
        if not self._pieces:
            return end
        self.add(end)
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._room = _HELD_BYTES
        return data


def _refuse_other_formats(path: str, parsed: Iterable[tuple[bytes, InputRow | BadRow]]) -> Iterator[InputRow | BadRow]:
    """The rows, unless the first NUM_FIRST_LINES of them (or all, in a shorter file) show another format: InputError.

    As long as no line has been an attempt at a JSON object, rows are held back; so a file is refused before any of
    its rows is seen, or never. A first line that betrays its format (see _MAGIC_BYTES) is enough.
    """
    held: list[BadRow] = []
    first_line = b""
    rows = iter(parsed)
    for data, item in rows:
        first_line = first_line or data
        if not isinstance(item, BadRow) or _attempts_an_object(data, item.code):
            yield from held
            held.clear()
            yield item
            break
        held.append(item)
        if len(held) == NUM_FIRST_LINES or (item.code != BadRowCode.NOT_OBJECT and _known_format(first_line)):
            break
    if held:
        raise _other_format(path, first_line, held[0].reason)
    for _, item in rows:
        yield item


def _attempts_an_object(data: bytes, code: str) -> bool:
    if code in (BadRowCode.NOT_UTF8, BadRowCode.LINE_TOO_LONG):
        return data.lstrip().startswith(b"{")
    return code not in (BadRowCode.NOT_JSON, BadRowCode.NOT_OBJECT)


def _known_format(first_line: bytes) -> str | None:
    """What the file is instead, and the cure."""
    return next((cure for magic, cure in _MAGIC_BYTES.items() if first_line.startswith(magic)), None)


def _other_format(path: str, first_line: bytes, reason: str) -> InputError:
    cure = _known_format(first_line)
    if cure is not None:
        return InputError(f"input={_printable(path)}: is not JSONL but {cure.format(path=_printable(path))}")
    return InputError(
        f'input={_printable(path)}: is not JSONL: each line must be an object such as {{"prompt": "..."}}, '
        f"but none of the first lines is one ({reason})"
    )


def _row_counts(paths: Iterable[str]) -> list[int] | None:
    counts: list[int] = []
    uncounted = MAX_COUNTED_BYTES
    for path in paths:
        if path == STANDARD_INPUT or not _is_regular(path):
            return None
        if _is_parquet(path):
            with _open_parquet(path) as file:
                counts.append(file.metadata.num_rows)
            continue
        uncounted -= os.path.getsize(path)
        if uncounted < 0:
            return None
        with _open_file(path) as stream:
            counts.append(sum(1 for _ in _Lines(stream)))
    return counts


# Parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unreadable:
    """A record that pyarrow has, but cannot turn into Python values."""

    code: BadRowCode
    reason: str


@contextmanager
def _open_parquet(path: str) -> "Iterator[pq.ParquetFile]":
    import pyarrow as pa  # 0.2 s that a job on JSONL need not spend
    import pyarrow.parquet as pq

    try:
        # Without pre_buffer, and with a buffer, a column is read page by page instead of a row group at once.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK_BYTES)
    except FileNotFoundError as error:
        raise _cannot_open(path, error) from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"input={_printable(path)}: is not a Parquet file that can be read ({_first_sentence(error)}); "
            "if it is JSONL, give it a name that ends in .jsonl"
        ) from None
    with file:
        yield file


def _records(path: str, file: "pq.ParquetFile", wanted: frozenset[str]) -> "Iterator[dict[str, object] | _Unreadable]":
    import pyarrow as pa

    columns = [name for name in file.schema_arrow.names if name in wanted]
    batches = file.iter_batches(batch_size=_RECORDS_PER_BATCH, columns=columns, use_threads=False)
    num_read = 0
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch = _without_times(batch)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"input={_printable(path)}: cannot be read behind record {num_read}: {_first_sentence(error)}"
            ) from error
        yield from _python_records(batch)
        num_read += batch.num_rows


def _python_records(batch: "pa.RecordBatch") -> "Iterator[dict[str, object] | _Unreadable]":
    try:
        records = batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError):
        records = (_python_record(batch.slice(index, 1)) for index in range(batch.num_rows))
    yield from records


def _python_record(record: "pa.RecordBatch") -> dict[str, object] | _Unreadable:
    try:
        return record.to_pylist(maps_as_pydicts="lossy")[0]
    except UnicodeDecodeError as error:
        return _Unreadable(code=BadRowCode.NOT_UTF8, reason=f"a string of the record is not UTF-8: {error}")
    except (ValueError, OverflowError) as error:
        return _Unreadable(code=BadRowCode.BAD_VALUE, reason=f"a value of the record cannot be read: {error}")


def _without_times(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Dates, times and decimals as their text: JSON has none of them."""
    for index, field in enumerate(batch.schema):
        if not _is_json_type(field.type) and _is_text_castable(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).cast("string"))
    return batch


def _is_text_castable(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind) or pa.types.is_decimal(kind)


def _is_json_type(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _is_json_type(kind.value_type)
    if types.is_nested(kind):
        return all(_is_json_type(kind.field(index).type) for index in range(kind.num_fields))
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)


def _unreadable_row(file: str, number: int, row: int, record: _Unreadable) -> BadRow:
    return BadRow(file=file, line=number, row=row, id=None, code=record.code.value, reason=record.reason)


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
