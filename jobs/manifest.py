"""manifest.json: what ran, where, and how it ended."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs import disk
from jobs.clock import Clock

NAME = "manifest.json"
SCHEMA_VERSION = 1
RUNNING, COMPLETE, FAILED, INTERRUPTED = "running", "complete", "failed", "interrupted"
KILLED = "killed"
"""Of an attempt that could not write down its end."""
ENDS = (COMPLETE, FAILED, INTERRUPTED)
OWN_FIELDS = ("schema_version", "status", "exit_code", "error", "clock_zero", "attempts")
OF_AN_ATTEMPT = ("config", "versions", "git", "machine", "device", "engine", "figures")
"""Fields of the top level that another attempt may change."""


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

        `facts` is what is known before the run: config, command, overrides, versions, git, machine.
        """
        content = {
            "schema_version": SCHEMA_VERSION,
            "status": RUNNING,
            "exit_code": None,
            "error": None,
            "clock_zero": clock.zero.isoformat(),
            **_checked(facts),
            "attempts": [_attempt(0, facts)],
        }
        disk.put(directory / NAME, _encode(content), beside=_beside(directory), exclusive=True)
        return cls(directory, content, clock)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """The manifest of a run that another process wrote; ValueError where it is none, or of a newer version."""
        content = json.loads((directory / NAME).read_bytes())
        check_version(content)
        return cls(directory, content, None)

    def resume(self, clock: Clock, facts: Mapping[str, Any]) -> None:
        """Begins one more attempt of a run that was loaded; its directory must be locked.

        What the top level says of an attempt moves into that attempt's entry.
        """
        last = self._content["attempts"][-1]
        last |= {name: self._content[name] for name in OF_AN_ATTEMPT if name in self._content}
        if last["ended"] is None:
            last["status"] = KILLED
        for name in OF_AN_ATTEMPT:
            self._content.pop(name, None)
        command = self._content["command"]  # stays the first one's: what made the directory
        self._content.update(_checked(facts), command=command, status=RUNNING, exit_code=None, error=None)
        self._content["attempts"].append(_attempt(last["attempt"] + 1, facts))
        self._clock = clock
        self._write()

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def get(self, name: str) -> Any:
        """None where the manifest does not have it."""
        return self._content.get(name)

    @property
    def attempt(self) -> int:
        """The latest one's number."""
        return self._content["attempts"][-1]["attempt"]

    def record(self, **facts: Any) -> None:
        """Adds or replaces fields such as model, input, counts, figures, device."""
        self._content.update(_checked(facts))
        self._write()

    def record_attempt(self, **facts: Any) -> None:
        """Adds fields to the latest attempt's entry."""
        self._content["attempts"][-1] |= facts
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
        end = {"status": status, "exit_code": exit_code, "error": error}
        self._content.update(end)
        self._content["attempts"][-1] |= {**end, "ended": _now()}
        self._write()

    def _write(self) -> None:
        disk.put(self._path, _encode(self._content), beside=_beside(self._path.parent))


def check_version(content: Any) -> None:
    """ValueError for a manifest that a later version of nanovllm wrote, and for what is no manifest."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"schema_version={version}: this is no run's manifest")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"schema_version={version} is newer than {SCHEMA_VERSION}, the newest that this version of nanovllm knows; "
            "use the version that wrote the run, or a later one"
        )


def is_recorded(attempt: Mapping[str, Any], config: Mapping[str, Any] | None) -> bool:
    """Whether an attempt, by its entry, had recorder=on; `config` is the top level's, for an entry without its own.

    An entry that does not say so itself was written by an earlier version, or by a process that died at once.
    """
    recorder = (attempt.get("config") or config or {}).get("recorder") or {}
    return bool(attempt.get("recorder", recorder.get("enabled", True)))


def remove_unfinished(directory: Path) -> None:
    """Removes what killed writers of the manifest have left; the directory must be locked."""
    for path in directory.glob(f".{NAME}.*.tmp"):
        disk.remove(path)


def _attempt(number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attempt": number,
        "started": _now(),
        "ended": None,
        "status": RUNNING,
        "exit_code": None,
        "error": None,
        "command": facts.get("command"),
        "overrides": facts.get("overrides"),
        "phases": [],
    }


def _beside(directory: Path) -> Path:
    return directory / f".{NAME}.{os.getpid()}.tmp"


def _checked(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    taken = [name for name in facts if name in OWN_FIELDS]
    if taken:
        raise ValueError(f"{', '.join(taken)}: the manifest sets these fields itself")
    return {name: value for name, value in facts.items() if name != "overrides"}  # they stand in the attempt


def _encode(content: dict[str, Any]) -> bytes:
    # File names may hold bytes that are not UTF-8; backslashreplace turns them into JSON's own escapes.
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _now() -> str:
    return datetime.now(UTC).isoformat()
