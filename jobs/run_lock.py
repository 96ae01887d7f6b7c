"""The lock on a run directory: whoever holds it is the only process that writes the run."""

import errno
import fcntl
import os
from pathlib import Path

NAME = "lock"


class Locked(FileExistsError):
    """Another process is writing this run."""


class RunLock:
    """An flock on DIR/lock, which the kernel gives back when the process ends, however it ends.

    The empty file stays: a run's directory is marked by it, and removing it could not be made safe for others.
    """

    def __init__(self, directory: Path) -> None:
        """Raises Locked, at once, where another process holds it."""
        self._path = directory / NAME
        self._file: int | None = _locked(self._path)

    def release(self, remove: bool = False) -> None:
        """`remove`: no run has begun here. A second call does nothing."""
        if self._file is None:
            return
        if remove:
            os.unlink(self._path)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # a child that is just being started may still have the file, too
        os.close(self._file)
        self._file = None


def is_locked(directory: Path) -> bool:
    """Whether a process is writing this run; changes nothing. False where it cannot be told.

    For an instant it holds a lock of its own, beside which no run can begin here.
    """
    try:
        file = os.open(directory / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(file, path):
                return file
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Locked(f"{path.parent}: another process is writing this run (it holds {path.name})") from None
            raise
        os.close(file)


def _is_same(file: int, path: Path) -> bool:
    """False where another process has removed the file between our opening and our locking it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
