"""What stands in for `os` in jobs.disk: calls that change the disk are counted, and one of them goes wrong."""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

BEFORE, TORN, AFTER = "before", "torn", "after"
MODES = (BEFORE, TORN, AFTER)


class CountingOs:
    """`os`, counting the calls that change the disk; syncs count but do nothing, since only power loss needs them."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if not flags & os.O_CREAT:
            return os.open(path, flags, mode)
        return self._call("open", os.open, path, flags, mode)

    def write(self, file: int, data: Any) -> int:
        return self._call("write", os.write, file, data)

    def fsync(self, file: int) -> None:
        self._call("fsync", lambda file: None, file)

    def fdatasync(self, file: int) -> None:
        self._call("fdatasync", lambda file: None, file)

    def ftruncate(self, file: int, size: int) -> None:
        self._call("ftruncate", os.ftruncate, file, size)

    def rename(self, source: Any, target: Any) -> None:
        self._call("rename", os.rename, source, target)

    def link(self, source: Any, target: Any) -> None:
        self._call("link", os.link, source, target)

    def unlink(self, path: Any) -> None:
        self._call("unlink", os.unlink, path)

    def mkdir(self, path: Any) -> None:
        self._call("mkdir", os.mkdir, path)

    def _call(self, name: str, call: Any, *arguments: Any) -> Any:
        with self._lock:
            self.num_calls += 1
            return self.at(self.num_calls, name, call, *arguments)

    def at(self, number: int, name: str, call: Any, *arguments: Any) -> Any:
        return call(*arguments)


class KillingOs(CountingOs):
    """Kills the process before, within (a write of half the bytes) or after the n-th call."""

    def __init__(self, number: int, mode: str) -> None:
        super().__init__()
        self._number = number
        self._mode = mode

    def at(self, number: int, name: str, call: Any, *arguments: Any) -> Any:
        if number != self._number:
            return call(*arguments)
        if self._mode == TORN and name == "write":
            file, data = arguments
            os.write(file, memoryview(data)[: len(data) // 2])
        elif self._mode == AFTER:
            call(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")


class FailingOs(CountingOs):
    """From the n-th call on, what needs space (ENOSPC) or the device at all (EIO) fails; a write is cut in half first.

    Removing and shortening work on a full disk.
    """

    def __init__(self, number: int, code: int, flag: Path) -> None:
        """`flag` is a file that is made when something fails."""
        super().__init__()
        self._number = number
        self._code = code
        self._flag = flag
        self._torn = False

    def at(self, number: int, name: str, call: Any, *arguments: Any) -> Any:
        if number < self._number or (self._code == errno.ENOSPC and name in ("unlink", "ftruncate", "fsync")):
            return call(*arguments)
        self._flag.touch()
        if name == "write" and not self._torn and len(arguments[1]) > 1:
            self._torn = True
            return os.write(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
        raise OSError(self._code, os.strerror(self._code))
