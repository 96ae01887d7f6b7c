"""A disk after a loss of power: what was synced is there; of the rest, anything may be, torn and in any order."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.jobs.disk_faults import CountingOs

NOTHING, EVERYTHING, SOMETHING = "nothing", "everything", "something"
POLICIES = (NOTHING, EVERYTHING, SOMETHING)
"""What survives of that which was not synced."""


@dataclass(frozen=True, slots=True)
class Write:
    inode: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Shorten:
    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class Names:
    """One atomic change of directory entries: names that get an inode (None: a directory), and names that go."""

    directory: str
    sets: dict[str, int | None] = field(default_factory=dict)
    removes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sync:
    inode: int


@dataclass(frozen=True, slots=True)
class SyncNames:
    directory: str


@dataclass(frozen=True, slots=True)
class Ack:
    log: str
    row: int
    line: bytes


class RecordingOs(CountingOs):
    """Does what it is asked, and keeps a list of it."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[Any] = []
        self._inodes: dict[int, int] = {}
        """By the real inode's number, since those are used again once a file is gone."""
        self._next_inode = 0

    def at(self, number: int, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        return getattr(self, f"_{name}")(*arguments)

    def _inode(self, file: int) -> int:
        return self._inodes[os.fstat(file).st_ino]

    def _open(self, path: Any, flags: int, mode: int) -> int:
        existed = os.path.exists(path)
        file = os.open(path, flags, mode)
        if not existed:
            self._inodes[os.fstat(file).st_ino] = self._next_inode
            self.trace.append(Names(str(Path(path).parent), {str(path): self._next_inode}))
            self._next_inode += 1
        elif flags & os.O_TRUNC:
            self.trace.append(Shorten(self._inode(file), 0))
        return file

    def _write(self, file: int, data: Any) -> int:
        written = os.write(file, data)
        self.trace.append(Write(self._inode(file), bytes(memoryview(data)[:written])))
        return written

    def _fsync(self, file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        self.trace.append(SyncNames(path) if os.path.isdir(path) else Sync(self._inode(file)))

    _fdatasync = _fsync

    def _ftruncate(self, file: int, size: int) -> None:
        os.ftruncate(file, size)
        self.trace.append(Shorten(self._inode(file), size))

    def _rename(self, source: Any, target: Any) -> None:
        inode = self._inodes[os.stat(source).st_ino]
        os.rename(source, target)
        self.trace.append(Names(str(Path(target).parent), {str(target): inode}, (str(source),)))

    def _link(self, source: Any, target: Any) -> None:
        inode = self._inodes[os.stat(source).st_ino]
        os.link(source, target)
        self.trace.append(Names(str(Path(target).parent), {str(target): inode}))

    def _unlink(self, path: Any) -> None:
        os.unlink(path)
        self.trace.append(Names(str(Path(path).parent), {}, (str(path),)))

    def _mkdir(self, path: Any) -> None:
        os.mkdir(path)
        self.trace.append(Names(str(Path(path).parent), {str(path): None}))


def acks_of(trace: list[Any]) -> dict[tuple[str, int], bytes]:
    return {(op.log, op.row): op.line for op in trace if isinstance(op, Ack)}


def build(trace: list[Any], policy: str, rng: random.Random, move: Callable[[str], Path]) -> None:
    """Makes one state that a loss of power after the last operation of `trace` may leave; `move` maps the paths."""
    entries = _entries(trace, policy, rng)
    contents = _contents(trace, policy, rng)
    for path, inode in sorted(entries.items()):
        target = move(path)
        if not target.parent.is_dir():  # the directory's own name was lost
            continue
        if inode is None:
            target.mkdir()
        else:
            target.write_bytes(contents.get(inode, b""))


def _entries(trace: list[Any], policy: str, rng: random.Random) -> dict[str, int | None]:
    entries: dict[str, int | None] = {}
    last_sync = {op.directory: index for index, op in enumerate(trace) if isinstance(op, SyncNames)}
    for index, op in enumerate(trace):
        if not isinstance(op, Names):
            continue
        durable = index < last_sync.get(op.directory, -1)
        if not (durable or policy == EVERYTHING or (policy == SOMETHING and rng.random() < 0.5)):
            continue
        for path in op.removes:
            entries.pop(path, None)
        entries |= op.sets
    return entries


def _contents(trace: list[Any], policy: str, rng: random.Random) -> dict[int, bytes]:
    contents: dict[int, bytearray] = {}
    last_sync = {op.inode: index for index, op in enumerate(trace) if isinstance(op, Sync)}
    for index, op in enumerate(trace):
        if isinstance(op, Write):
            data = op.data
            if index > last_sync.get(op.inode, -1) and policy != EVERYTHING:
                data = b"" if policy == NOTHING else _torn(data, rng)
            contents.setdefault(op.inode, bytearray()).extend(data)
        elif isinstance(op, Shorten):
            durable = index < last_sync.get(op.inode, -1)
            if durable or policy == EVERYTHING or (policy == SOMETHING and rng.random() < 0.5):
                del contents.setdefault(op.inode, bytearray())[op.size :]
    return {inode: bytes(data) for inode, data in contents.items()}


def _torn(data: bytes, rng: random.Random) -> bytes:
    """All, nothing, a beginning, or the right length with a hole of zeros in it, as pages are written one by one."""
    kind = rng.randrange(4)
    if kind == 0:
        return data
    if kind == 1:
        return b""
    begin = rng.randrange(len(data)) if data else 0
    if kind == 2:
        return data[:begin]
    end = rng.randrange(begin, len(data)) if data else 0
    return data[:begin] + b"\0" * (end - begin) + data[end:]
