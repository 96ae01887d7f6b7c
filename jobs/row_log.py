"""A file of lines that grows as rows finish: every line checks itself, and none is there before it is on the disk."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np

from jobs import disk
from jobs.line_index import CHUNK, ENTRY, LineIndex, RowLogError

_READ_BYTES = 1024 * 1024
_SEAL = b',"crc32":"%08x"}\n'
_SEAL_BYTES = len(_SEAL % 0)


class _Key(msgspec.Struct):
    """What a line is found again by."""

    row: int
    sample: int = 0


class RowLog:
    """Lines of JSON, each an object with a `row` and, unless that is 0, a `sample`; appended in groups.

    On the disk each object has one more key, the last: `crc32`, of the bytes before its comma. A line that a crash or a
    loss of power has left incomplete or changed is thus told from a whole one, and `recover` cuts the file there.

    - `add` takes rows, `flush` makes them durable: one write and, unless the log is for the death of the process alone,
      one fdatasync. Only then do they count.
    - After an error of the disk the log takes no more; what it had counted before stays valid.
    - Memory: what waits for a flush. Where each line stands is read from the file when it is asked for (see `index`).

    Not for several threads at once.
    """

    def __init__(self, path: Path, *, power: bool = True) -> None:
        """Makes the file; FileExistsError where there is one."""
        self._begin(path, power, disk.create(path))
        if power:
            disk.sync_directory(path.parent)

    @classmethod
    def recover(cls, path: Path, see: Callable[[bytes], object], *, power: bool = True) -> "RowLog":
        """Opens the log of an earlier attempt, or makes it where that had not come so far.

        `see` is shown each whole line as `add` once got it. The file is cut behind the last line before the first bad
        one. Doing this again, also after dying within it, gives the same.
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
        self.num_flushed = 0
        """Lines that are acknowledged: in the file, and as durable as the log makes them."""
        self._waiting: list[bytes] = []
        """With their checksums."""
        self._size = 0
        self._power = power
        self._failed = False
        self._file: int | None = file

    def add(self, lines: Sequence[bytes]) -> None:
        """JSON objects as they will stand in the final file, without their line breaks."""
        self._open_file()
        sealed = [sealed_line(line) for line in lines]
        self._waiting += sealed
        self.num_bytes += sum(map(len, sealed))

    def flush(self) -> None:
        """Makes what was added durable and counts it."""
        file = self._open_file()
        if not self._waiting:
            return
        self._failed = True  # until all of it is done
        try:
            with disk.naming(self.path):
                disk.append(file, b"".join(self._waiting))
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

    def index(self) -> LineIndex:
        """Of the acknowledged lines, read through for it; RowLogError where a (row, sample) stands twice.

        Some microseconds a line, so whoever needs it once more keeps it only as long as that takes.
        """
        return LineIndex(self.path, np.fromiter(self._entries(), ENTRY, self.num_flushed))

    def read(self, index: LineIndex) -> Iterator[bytes]:
        """The acknowledged lines by row and sample, as they were added, line breaks included."""
        file = self._open_file()
        for first in range(0, len(index.order), CHUNK):
            for place in index.order[first : first + CHUNK].tolist():
                begin, end = index.bounds(place)
                yield self._unsealed(_read_all(file, begin, end - begin), place) + b"\n"

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

    def _count(self, sealed: Sequence[bytes]) -> None:
        self._size += sum(map(len, sealed))
        self.num_flushed += len(sealed)

    def _entries(self) -> Iterator[tuple[int, int, int]]:
        """(row, sample, end) of each acknowledged line, as ENTRY has them."""
        file, end = self._open_file(), 0
        if (in_file := os.fstat(file).st_size) < self._size:
            raise _shortened(in_file)
        decode = msgspec.json.Decoder(_Key).decode
        for place, sealed in enumerate(_lines(file, self._size)):
            end += len(sealed)
            key = decode(self._unsealed(sealed, place))
            yield key.row, key.sample, end

    def _unsealed(self, sealed: bytes, place: int) -> bytes:
        line = unsealed_line(sealed)
        if line is None:
            raise RowLogError(f"{self.path}: line {place + 1} has changed on the disk")
        return line

    def _read_back(self, see: Callable[[bytes], object]) -> None:
        file = self._open_file()
        in_file = os.fstat(file).st_size
        for sealed in _lines(file, in_file):
            line = unsealed_line(sealed)
            if line is None:
                break
            see(line)
            self._count([sealed])
        self.num_cut_bytes = in_file - self._size
        if self.num_cut_bytes:
            disk.truncate(file, self._size)
        if self._power:
            disk.sync(file)  # also what a killed attempt wrote and had no time to sync: it counts from here on
            disk.sync_directory(self.path.parent)


def sealed_line(line: bytes) -> bytes:
    """A JSON object with its checksum, and a line break."""
    body = line[:-1]
    return body + _SEAL % crc32(body)


def unsealed_line(sealed: bytes) -> bytes | None:
    """What `sealed_line` was given; None for anything that it cannot have made."""
    body = sealed[:-_SEAL_BYTES]
    return body + b"}" if body and sealed[-_SEAL_BYTES:] == _SEAL % crc32(body) else None


def _lines(file: int, size: int) -> Iterator[bytes]:
    """The lines of the file's first `size` bytes, line breaks included; an incomplete last line comes without one."""
    rest, at = b"", 0
    while data := os.pread(file, min(_READ_BYTES, size - at), at):
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
            raise _shortened(begin + len(data))
        data += more
    return data


def _shortened(at: int) -> OSError:
    return OSError(f"the file of finished rows ends at byte {at}; somebody has shortened it")
