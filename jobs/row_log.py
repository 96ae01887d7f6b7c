"""A file of lines that grows as rows finish: every line checks itself, and none is there before it is on the disk."""

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from jobs import disk

ORDER_CHUNK = 65536
"""Indices that are Python integers at the same time: a million would take 36 MB."""
_READ_BYTES = 4 * 1024 * 1024
_SEAL = b',"crc32":"%08x"}\n'
_SEAL_BYTES = len(_SEAL % 0)


class RowLogError(RuntimeError):
    """A log holds what no crash of ours can have left."""


@dataclass(frozen=True, slots=True)
class RowLine:
    """One finished row, encoded."""

    row: int
    sample: int
    line: bytes
    """A JSON object of at least one key, as it will stand in the final file; without its line break."""


class RowLog:
    """Lines of JSON, appended in groups, each found again by the order in which it came.

    On the disk each object has one more key, the last: `crc32`, of the bytes before its comma. A line that a crash or a
    loss of power has left incomplete or changed is thus told from a whole one, and `recover` cuts the file there.

    - `add` takes rows, `flush` makes them durable: one write and, unless the log is for the death of the process alone,
      one fdatasync. Only then do they count.
    - After an error of the disk the log takes no more; what it had counted before stays valid.
    - Memory: 14 bytes a row. Rows are below 2^32, samples below 2^16.

    Not for several threads at once.
    """

    def __init__(self, path: Path, *, power: bool = True) -> None:
        """Makes the file; FileExistsError where there is one."""
        self._begin(path, power, disk.create(path))
        if power:
            disk.sync_directory(path.parent)

    @classmethod
    def recover(cls, path: Path, see: Callable[[bytes], tuple[int, int]], *, power: bool = True) -> "RowLog":
        """Opens the log of an earlier attempt, or makes it where that had not come so far.

        `see` is shown each whole line as `add` once got it, and says row and sample. The file is cut behind the last
        line before the first bad one. Doing this again, also after dying within it, gives the same.
        """
        if not path.exists():
            return cls(path, power=power)
        log = cls.__new__(cls)
        log._begin(path, power, disk.reopen(path))
        try:
            log._read_back(see)
        except BaseException:
            log.close()
            raise
        return log

    def _begin(self, path: Path, power: bool, file: int) -> None:
        self.path = path
        self.num_bytes = 0
        """Of rows that have been added and are not yet flushed."""
        self.num_cut_bytes = 0
        """Of an incomplete end that `recover` has cut off."""
        self._rows = array("I")
        self._samples = array("H")
        self._ends = array("q")
        """Where each line ends in the file; it begins where the one before it ends."""
        self._waiting: list[RowLine] = []
        """With their checksums."""
        self._size = 0
        self._power = power
        self._failed = False
        self._file: int | None = file

    @property
    def num_flushed(self) -> int:
        """Rows that are acknowledged: in the file, and as durable as the log makes them."""
        return len(self._ends)

    @property
    def rows(self) -> np.ndarray:
        """uint32 [rows]: of the acknowledged rows, in the order in which they came.

        A view: while it is alive, no row can be added.
        """
        return np.asarray(self._rows)

    @property
    def num_rows(self) -> int:
        """Different ones."""
        return len(np.unique(self.rows))

    def add(self, lines: Sequence[RowLine]) -> None:
        self._open_file()
        for line in lines:
            sealed = sealed_line(line.line)
            self._waiting.append(RowLine(line.row, line.sample, sealed))
            self.num_bytes += len(sealed)

    def flush(self) -> None:
        """Makes what was added durable and counts it."""
        file = self._open_file()
        if not self._waiting:
            return
        self._failed = True  # until all of it is done
        try:
            with disk.naming(self.path):
                disk.append(file, b"".join(line.line for line in self._waiting))
                if self._power:
                    disk.sync_data(file)
        except BaseException:
            # Nobody knows what of it is on the device; recovery, which reads the cache, must not take it for durable.
            with contextlib.suppress(OSError):
                disk.truncate(file, self._size)
            raise
        self._failed = False
        self._count(self._waiting)
        self._waiting = []
        self.num_bytes = 0

    def order(self) -> np.ndarray:
        """The lines' indices sorted by (row, sample); RowLogError where one of these stands twice."""
        rows, samples = self.rows, np.asarray(self._samples)
        order = np.lexsort((samples, rows)) if samples.any() else np.argsort(rows, kind="stable")
        for first in range(0, len(order), ORDER_CHUNK):
            chunk = order[first : first + ORDER_CHUNK + 1]
            again = (np.diff(rows[chunk]) == 0) & (np.diff(samples[chunk]) == 0)
            if again.any():
                twice = chunk[int(again.argmax())]
                raise RowLogError(f"{self.path}: row {rows[twice]}, sample {samples[twice]} was written twice")
        return order

    def read(self, order: np.ndarray) -> Iterator[bytes]:
        """The acknowledged lines in this order, as they were added, line breaks included."""
        file = self._open_file()
        for first in range(0, len(order), ORDER_CHUNK):
            for index in order[first : first + ORDER_CHUNK].tolist():
                begin = self._ends[index - 1] if index else 0
                yield self._unsealed(_read_all(file, begin, self._ends[index] - begin), index) + b"\n"

    def close(self) -> None:
        """Gives the file back; what was not flushed is not there. A second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open_file(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path}: is closed")
        if self._failed:
            raise OSError(f"{self.path}: an earlier write failed, so nothing more is written")
        return self._file

    def _count(self, sealed: Sequence[RowLine]) -> None:
        for line in sealed:
            self._size += len(line.line)
            self._rows.append(line.row)
            self._samples.append(line.sample)
            self._ends.append(self._size)

    def _unsealed(self, sealed: bytes, index: int) -> bytes:
        line = unsealed_line(sealed)
        if line is None:
            raise RowLogError(f"{self.path}: line {index + 1} has changed on the disk")
        return line

    def _read_back(self, see: Callable[[bytes], tuple[int, int]]) -> None:
        file = self._open_file()
        for sealed in _lines(file):
            line = unsealed_line(sealed)
            if line is None:
                break
            self._count([RowLine(*see(line), sealed)])
        self.num_cut_bytes = os.fstat(file).st_size - self._size
        if self.num_cut_bytes:
            disk.truncate(file, self._size)
        if self._power:
            disk.sync(file)  # also what a killed attempt wrote and had no time to sync: it counts from here on
            disk.sync_directory(self.path.parent)
        self.order()  # raises where a row stands twice


def sealed_line(line: bytes) -> bytes:
    """A JSON object with its checksum, and a line break."""
    body = line[:-1]
    return body + _SEAL % crc32(body)


def unsealed_line(sealed: bytes) -> bytes | None:
    """What `sealed_line` was given; None for anything that it cannot have made."""
    body = sealed[:-_SEAL_BYTES]
    return body + b"}" if body and sealed[-_SEAL_BYTES:] == _SEAL % crc32(body) else None


def _lines(file: int) -> Iterator[bytes]:
    """The file's lines from its start, line breaks included; an incomplete last line comes without one."""
    rest, at = b"", 0
    while data := os.pread(file, _READ_BYTES, at):
        at += len(data)
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _read_all(file: int, begin: int, size: int) -> bytes:
    data = os.pread(file, size, begin)
    while len(data) < size:
        more = os.pread(file, size - len(data), begin + len(data))
        if not more:
            raise OSError(f"the file of finished rows ends at byte {begin + len(data)}; somebody has shortened it")
        data += more
    return data
