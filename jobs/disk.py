"""Every change to a run directory that must not be lost or seen half done: the only module that makes them.

What a test has to fail, to record or to break off is then a handful of calls in one place.
"""

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER_BYTES = 1024 * 1024

DURABILITIES = ("power", "process")
"""What an acknowledged row survives: a loss of power (and the death of the process), or that death alone."""

_sync_data = "fdatasync" if hasattr(os, "fdatasync") else "fsync"  # macOS has the second alone
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}
_Checked = TypeVar("_Checked")


def create(path: Path) -> int:
    """A new empty file, open for reading and appending; FileExistsError where there is one."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)


def reopen(path: Path) -> int:
    """A file that exists, open for reading and appending."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)


def append(file: int, data: bytes | memoryview) -> None:
    """All of it: one write, but for a signal or a disk that is about to be full."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def sync_data(file: int) -> None:
    """What was written is on the device when this returns. After an error nobody knows what is: never go on."""
    getattr(os, _sync_data)(file)


def sync(file: int) -> None:
    os.fsync(file)


def truncate(file: int, size: int) -> None:
    os.ftruncate(file, size)


def remove(path: Path) -> None:
    """Removes a file that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def make_directory(path: Path) -> None:
    """One directory, whose name survives a loss of power; FileExistsError where there is one."""
    os.mkdir(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Names that were made, changed or removed in it survive a loss of power."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def replace(
    path: Path,
    write: Callable[[BinaryIO], object],
    check: Callable[[Path], _Checked],
    *,
    beside: Path | None = None,
    durable: bool = True,
) -> _Checked:
    """Lets `write` make the file under another name; it gets its own once it is complete, on the device and checked.

    Returns what `check` made of the complete file. `beside` is the other name, `.NAME.tmp` otherwise; what is there
    is overwritten. Without `durable` the file is whole for every reader, but may be lost with the machine.
    """
    beside = path.with_name(f".{path.name}.tmp") if beside is None else beside
    with _removed_unless_done(beside):
        _write_file(beside, write, durable)
        checked = check(beside)
        os.rename(beside, path)
    if durable:
        sync_directory(path.parent)
    return checked


def put(path: Path, data: bytes, *, beside: Path, exclusive: bool = False) -> None:
    """A whole small file by this name; with `exclusive`, FileExistsError where there is one already."""
    with _removed_unless_done(beside):
        _write_file(beside, lambda file: file.write(data), durable=True)
        if exclusive:
            _link(beside, path)
        else:
            os.rename(beside, path)
    sync_directory(path.parent)


def sha256_of(path: Path) -> tuple[int, str]:
    """(bytes, sha256) as they are read back."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def free_space(path: Path) -> str:
    """For an error's text: what is left where `path` lies."""
    try:
        stat = os.statvfs(path)
    except OSError as error:
        return f"how much is free in {path} cannot be told ({error})"
    return f"{stat.f_bavail * stat.f_frsize:,} bytes and {stat.f_favail:,} inodes are free in {path}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that comes without a file's name, as those of open files do, gets this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def _removed_unless_done(beside: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what fills a disk must not stay on it; the first error is the one to tell
            os.unlink(beside)
        raise


def _link(beside: Path, path: Path) -> None:
    """Gives the file its name only where nothing has it: a hard link is both exclusive and atomic."""
    try:
        os.link(beside, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.close(create(path))
        os.rename(beside, path)
    remove(beside)


def _write_file(path: Path, write: Callable[[BinaryIO], object], durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        with naming(path), io.BufferedWriter(_Raw(descriptor), BUFFER_BYTES) as file:
            write(file)
        if durable:
            with naming(path):
                sync(descriptor)
    finally:
        os.close(descriptor)


class _Raw(io.RawIOBase):
    """A descriptor, which stays open, as Python's buffers and pyarrow want to write to it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def write(self, data: "ReadableBuffer", /) -> int:
        return os.write(self._descriptor, data)
