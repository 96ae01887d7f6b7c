"""Broken variants of how a run keeps what it has done, each a function that breaks it in this process."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jobs.launch
from jobs import disk, row_log
from jobs.journal import Journal
from jobs.line_index import LineIndex
from jobs.results import Results
from jobs.row_log import RowLog
from jobs.rows import BadRow, InputRow


def no_tail_truncation() -> None:
    """An incomplete line stays, and the next row is appended to it."""
    read_back = RowLog._read_back

    def keep_tail(self: RowLog, see: Any) -> None:
        before, disk.truncate = disk.truncate, lambda file, size: None
        try:
            read_back(self, see)
        finally:
            disk.truncate = before

    RowLog._read_back = keep_tail


def no_checksum() -> None:
    """Whatever ends like a line is taken for one."""
    row_log.unsealed_line = lambda sealed: sealed[: -row_log._SEAL_BYTES] + b"}" if sealed.endswith(b'"}\n') else None


def acknowledged_before_the_sync() -> None:
    disk.sync_data = lambda file: None


def no_sync_before_the_rename() -> None:
    disk.sync = lambda file: None


def no_sync_of_directories() -> None:
    disk.sync_directory = lambda path: None


def rows_before_records() -> None:
    def backwards(self: Journal) -> None:
        for stage in reversed(self._stages):
            stage.flush()

    Journal._flush = backwards


def final_file_in_place() -> None:
    """No other name first: a reader sees half of it."""

    def in_place(path: Path, write: Any, check: Any, *, beside: Path | None = None, durable: bool = True) -> Any:
        disk._write_file(path, write, durable)
        return check(path)

    disk.replace = in_place


def manifest_in_place() -> None:
    def in_place(path: Path, data: bytes, *, beside: Path, exclusive: bool = False) -> None:
        disk._write_file(path, lambda file: file.write(data), True)

    disk.put = in_place


def logs_removed_before_the_manifest_names_the_files() -> None:
    finish = Results.finish

    def finish_and_remove(self: Results, num_rows: int) -> Any:
        outputs = finish(self, num_rows)
        self.remove_logs()
        return outputs

    Results.finish = finish_and_remove


def done_rows_not_skipped() -> None:
    def all_of_them(self: Results, rows: Iterable[InputRow | BadRow]) -> Iterator[InputRow | BadRow]:
        yield from rows

    Results.missing = all_of_them


def last_row_forgotten() -> None:
    """The final file lacks a row, and nobody counts."""

    def without_last(self: RowLog, index: LineIndex) -> Iterator[bytes]:
        index.order = index.order[:-1]
        return read(self, index)

    read, RowLog.read = RowLog.read, without_last


def numbers_begin_anew() -> None:
    from jobs.continuation import Continuation

    jobs.launch.continuation = lambda directory, manifest: Continuation()


SYNCS = (acknowledged_before_the_sync, no_sync_before_the_rename, no_sync_of_directories)
"""Those that only a loss of power shows."""
KILLS: tuple[Callable[[], None], ...] = (
    no_tail_truncation,
    rows_before_records,
    final_file_in_place,
    manifest_in_place,
    logs_removed_before_the_manifest_names_the_files,
    done_rows_not_skipped,
    last_row_forgotten,
    numbers_begin_anew,
)
TAILS = (no_checksum,)
"""Those that only a torn or damaged end of a log shows."""
BY_NAME = {mutant.__name__: mutant for mutant in (*SYNCS, *KILLS, *TAILS)}
