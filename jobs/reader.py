"""Input files as a stream of rows: JSONL and Parquet, one file, a glob, or standard input."""

import hashlib
import io
import itertools
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jobs.input_paths import STANDARD_INPUT, InputError, is_parquet, is_regular, open_file, printable, resolve_paths
from jobs.lines import ByteStream, Lines
from jobs.other_formats import NUM_FIRST_LINES, refuse_other_formats
from jobs.parquet_records import Unreadable, is_json_type, is_text_castable, open_parquet, read_records
from jobs.prompt_forms import PROMPT_FORMS
from jobs.refusal import BadRowCode
from jobs.rows import BadRow, InputRow, RowParser

if TYPE_CHECKING:
    import pyarrow as pa

MAX_COUNTED_BYTES = 4 * 1024**3
"""Counting the rows of larger JSONL files (seconds for each 4 GiB) is not worth a total in the progress bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """What was read of one input file, for the manifest."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    """Of the file's bytes. Under reader.limit, of a JSONL file's bytes up to the end of the last line read."""


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
        chat_template_kwargs: Mapping[str, object] | None = None,
        batch_only: bool = False,
        stdin: ByteStream | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"reader.limit={limit}: must be an integer of at least 1")
        self._parser = RowParser(
            prompt=prompt,
            system=system,
            keep=keep,
            chat_template_kwargs=chat_template_kwargs,
            batch_only=batch_only,
        )
        self._paths = resolve_paths(source)
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
            elif is_parquet(path):
                with open_parquet(path) as file:
                    self._check_columns(path, file.schema_arrow)
            elif is_regular(path):
                self._check_beginning(path)

    def absent_columns(self) -> tuple[str, ...]:
        """Names of writer.keep that none of the first NUM_FIRST_LINES rows of any file has: typing errors, perhaps.

        A line of JSONL may leave out what it has no value for, so only the end of the input would tell for sure.
        Parquet has a schema, and `check` refuses a file without the column. Pipes are not read.
        """
        absent, seen = set(self._keep), False
        for path in self._paths:
            if not absent or path == STANDARD_INPUT or is_parquet(path) or not is_regular(path):
                return ()
            for row in self._beginning(path):
                if isinstance(row, InputRow):
                    seen = True
                    absent -= {name for name, value in row.columns.items() if value is not None}
        return tuple(name for name in self._keep if seen and name in absent)

    def count(self) -> int | None:
        """How many rows an iteration will give; None where only reading tells (pipes) or it takes too long."""
        counts = _row_counts(self._paths)
        total = None if counts is None else sum(counts)
        return total if total is None or self._limit is None else min(total, self._limit)

    def _rows_of(self, path: str, first_row: int, limit: int | None) -> Generator[InputRow | BadRow]:
        if path != STANDARD_INPUT and is_parquet(path):
            return self._parquet_rows(path, first_row, limit)
        return self._jsonl_rows(path, first_row, limit)

    # JSONL

    def _jsonl_rows(self, path: str, first_row: int, limit: int | None) -> Generator[InputRow | BadRow]:
        with self._open(path) as stream:
            lines = Lines(stream)
            num_rows = 0
            try:
                for item in refuse_other_formats(path, self._parsed(path, lines, first_row)):
                    num_rows += 1
                    yield item
                    if num_rows == limit:
                        return
            finally:
                lines.stop()
                self._files.append(
                    InputFile(path=printable(path), num_rows=num_rows, num_bytes=lines.num_bytes, sha256=lines.sha256)
                )

    def _parsed(self, path: str, lines: Lines, first_row: int) -> Iterator[tuple[bytes, InputRow | BadRow]]:
        file, parse = printable(path), self._parser.from_line
        for row, (number, data) in enumerate(lines, first_row):
            yield data, parse(file, number, row, data)

    @contextmanager
    def _open(self, path: str) -> Iterator[ByteStream]:
        if path == STANDARD_INPUT:
            yield _standard_input(self._stdin)
            return
        with open_file(path) as stream:
            yield stream

    def _beginning(self, path: str) -> list[InputRow | BadRow]:
        with closing(self._jsonl_rows(path, 0, NUM_FIRST_LINES)) as rows:
            first = list(rows)
        self._files.clear()
        return first

    def _check_beginning(self, path: str) -> None:
        first = self._beginning(path)
        if first and all(isinstance(r, BadRow) and r.code == BadRowCode.SYSTEM_NEEDS_MESSAGES for r in first):
            raise InputError(
                f"reader.system: {printable(path)} has rows without messages, which take no system message; "
                "leave reader.system out or write the rows as messages"
            )
        if first and all(isinstance(r, BadRow) and r.code == BadRowCode.NOT_BATCH_LINE for r in first):
            raise InputError(
                f"writer.format=openai_batch: {printable(path)} has rows that are no OpenAI Batch lines (custom_id and "
                "body), whose answers have no such form; use writer.format=jsonl"
            )

    # Parquet

    def _parquet_rows(self, path: str, first_row: int, limit: int | None) -> Generator[InputRow | BadRow]:
        file_name = printable(path)
        num_bytes, sha256 = _digest(path)
        num_rows = 0
        try:
            with open_parquet(path) as file:
                self._check_columns(path, file.schema_arrow)
                records = read_records(path, file, self._parser.columns())
                for record in itertools.islice(records, limit):
                    number, row = num_rows + 1, first_row + num_rows
                    num_rows += 1
                    if isinstance(record, Unreadable):
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
                f"{printable(path)}: has no column {', '.join(PROMPT_FORMS)}, nor custom_id and body; its columns are "
                f"{names}; reader.prompt=COLUMN takes the prompts from one of them"
            )
        for key, wanted in (("reader.prompt", template.columns if template else ()), ("writer.keep", self._keep)):
            for name in wanted:
                if name not in schema.names:
                    raise InputError(f"{printable(path)}: has no column {name} ({key}); its columns are {names}")
        for name in self._keep:
            kind = schema.field(name).type
            if not is_json_type(kind) and not is_text_castable(kind):
                raise InputError(f"{printable(path)}: column {name} (writer.keep) is {kind}, which is not JSON")


def check_input(
    source: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    keep: Sequence[str] = (),
    batch_only: bool = False,
    stdin: ByteStream | None = None,
) -> None:
    """Raises InputError for an input that cannot be read, before anything else has been made for the run.

    Cheap: it looks at each file's first lines (JSONL) or footer (Parquet). Refused are a missing or unreadable file, a
    directory, a glob without files, a JSONL file of which none of the first lines is an attempt at a JSON object (CSV,
    compressed files, JSON arrays), a Parquet name without Parquet in it or without the columns that prompts and
    writer.keep need. Standard input and other pipes are not read: RowReader raises the same errors when it reads them.
    Settings that contradict each other raise ValueError.
    """
    RowReader(source, prompt=prompt, system=system, keep=keep, batch_only=batch_only, stdin=stdin).check()


def _standard_input(stdin: ByteStream | None) -> ByteStream:
    if stdin is not None:
        return stdin
    if sys.stdin is None:
        raise InputError("input=-: there is no standard input; name a file")
    try:
        descriptor = sys.stdin.fileno()
    except io.UnsupportedOperation:  # a program has put something else in its place
        return cast(io.BufferedReader, sys.stdin.buffer)
    # A buffer of our own: at its exit Python takes the lock of sys.stdin's, which a thread that waits for input holds.
    return io.BufferedReader(io.FileIO(descriptor, closefd=False))


def _digest(path: str) -> tuple[int, str]:
    """(bytes, sha256) of a whole file."""
    with open_file(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def _row_counts(paths: Iterable[str]) -> list[int] | None:
    counts: list[int] = []
    uncounted = MAX_COUNTED_BYTES
    for path in paths:
        if path == STANDARD_INPUT or not is_regular(path):
            return None
        if is_parquet(path):
            with open_parquet(path) as file:
                counts.append(file.metadata.num_rows)
            continue
        uncounted -= os.path.getsize(path)
        if uncounted < 0:
            return None
        with open_file(path) as stream:
            counts.append(sum(1 for _ in Lines(stream)))
    return counts


def _unreadable_row(file: str, number: int, row: int, record: Unreadable) -> BadRow:
    return BadRow(file=file, line=number, row=row, id=None, code=record.code.value, reason=record.reason)
