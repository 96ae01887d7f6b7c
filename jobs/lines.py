"""A byte stream as lines, with count and hash of what was gone through."""

import hashlib
from collections.abc import Generator, Iterator
from typing import Protocol

from jobs.json_line import MAX_LINE_BYTES

CHUNK_BYTES = 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_HELD_BYTES = MAX_LINE_BYTES + len(_BOM) + 1
"""Of a line that is too long: enough to see that it is."""


class ByteStream(Protocol):
    """What is read as JSONL: open(path, "rb"), sys.stdin.buffer, io.BytesIO."""

    def read1(self, size: int, /) -> bytes: ...


class Lines:
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
        while chunk := self._stream.read1(CHUNK_BYTES):
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
