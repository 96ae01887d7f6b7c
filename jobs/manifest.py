"""manifest.json: what ran, where, and how it ended."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.clock import Clock

NAME = "manifest.json"
SCHEMA_VERSION = 1
RUNNING, COMPLETE, FAILED, INTERRUPTED = "running", "complete", "failed", "interrupted"
ENDS = (COMPLETE, FAILED, INTERRUPTED)
OWN_FIELDS = ("schema_version", "status", "exit_code", "error", "clock_zero", "attempts")

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}


class Manifest:
    """The manifest of one run, on disk after every change.

    A reader finds, at any instant, the whole of the last version: each is written beside the old one, flushed to the
    device and renamed over it. One thread writes it.
    """

    def __init__(self, directory: Path, content: dict[str, Any], clock: Clock | None) -> None:
        self._path = directory / NAME
        self._content = content
        self._clock = clock

    @classmethod
    def create(cls, directory: Path, clock: Clock, facts: Mapping[str, Any]) -> "Manifest":
        """Writes the first version, status running; FileExistsError where the directory has a manifest.

        `facts` is what is known before the run: config, command, versions, git, machine.
        """
        content = {
            "schema_version": SCHEMA_VERSION,
            "status": RUNNING,
            "exit_code": None,
            "error": None,
            "clock_zero": clock.zero.isoformat(),
            **_checked(facts),
            "attempts": [{"attempt": 0, "started": _now(), "ended": None, "phases": []}],
        }
        _write_first(directory / NAME, _encode(content))
        return cls(directory, content, clock)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """The manifest of a run that another process wrote."""
        return cls(directory, json.loads((directory / NAME).read_bytes()), None)

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def record(self, **facts: Any) -> None:
        """Adds or replaces fields such as model, input, counts, figures, device."""
        self._content.update(_checked(facts))
        self._write()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase outside the steps (load, capture, generate, write, finish), also when it ends in an error."""
        if self._clock is None:
            raise ValueError("a manifest that was loaded belongs to a run whose clock is gone")
        start_ns = self._clock.now_ns()
        try:
            yield
        finally:
            phases = self._content["attempts"][-1]["phases"]
            phases.append({"name": name, "start_ns": start_ns, "end_ns": self._clock.now_ns()})
            self._write()

    def finish(self, status: str, exit_code: int, error: str | None = None) -> None:
        """The run has ended: complete, failed or interrupted."""
        if status not in ENDS:
            raise ValueError(f"status={status}: must be one of {', '.join(ENDS)}")
        self._content.update(status=status, exit_code=exit_code, error=error)
        self._content["attempts"][-1]["ended"] = _now()
        self._write()

    def _write(self) -> None:
        _replace(self._path, _encode(self._content))


def _checked(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    taken = [name for name in facts if name in OWN_FIELDS]
    if taken:
        raise ValueError(f"{', '.join(taken)}: the manifest sets these fields itself")
    return facts


def _encode(content: dict[str, Any]) -> bytes:
    # File names may hold bytes that are not UTF-8; backslashreplace turns them into JSON's own escapes.
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _write_first(path: Path, data: bytes) -> None:
    """Puts a complete file there, or raises FileExistsError: a hard link is both exclusive and atomic."""
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_directory(path.parent)


def _replace(path: Path, data: bytes) -> None:
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_directory(path.parent)


def _write_beside(path: Path, data: bytes) -> Path:
    """A temporary file in the same directory, flushed to the device."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
