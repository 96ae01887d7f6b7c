"""A file of lines that grows as rows finish, each line found again by the order in which it came."""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GROUP_BYTES = 1024 * 1024
"""Appended without waiting for flush(), so that what waits stays small."""
ORDER_CHUNK = 65536
"""Indices that are Python integers at the same time: a million would take 36 MB."""


class AppendLog:
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
        if self._waiting_bytes >= GROUP_BYTES:
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
        for first in range(0, len(order), ORDER_CHUNK):
            for index in order[first : first + ORDER_CHUNK].tolist():
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
