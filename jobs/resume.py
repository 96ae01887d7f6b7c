"""Going on with a run that ended early: its own configuration, the same answers, one process at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import command_line, disk
from jobs.complaints import shown
from jobs.compose import ConfigSource, merge_overrides
from jobs.file_hashes import file_differences
from jobs.manifest import NAME as MANIFEST
from jobs.manifest import Manifest
from jobs.masking import MASK
from jobs.run_lock import Locked, RunLock
from jobs.usage import UsageError

KEY = "resume"
MAX_SHOWN = 8
"""Differences that a refusal lists."""


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A run directory that this process has locked, and what its manifest says."""

    given: str
    """As the user wrote it."""
    path: Path
    manifest: Manifest

    def overrides(self, source: ConfigSource[Any], more: Sequence[str]) -> list[str]:
        """What the run's attempts were given, and `more` on top: the latest of several for one key counts.

        UsageError for what was masked when it was written down, unless it is given anew.
        """
        earlier = [_overrides_of(attempt["command"]) for attempt in self.manifest["attempts"]]
        merged = merge_overrides(source, [*(word for words in earlier for word in words), *more], without=KEY)
        hidden = next((word for word in merged if MASK in word), None)
        if hidden is not None:
            raise self.refusal(f"{hidden.partition('=')[0]} was a secret and is not written down; give it again")
        return merged

    def extra_dir(self) -> Path | None:
        """The run's own --config-dir."""
        return command_line.parse(self.manifest["command"][3:]).config_dir

    def check_config(self, config: Mapping[str, Any], free_keys: Sequence[str]) -> None:
        """UsageError that names every key outside of `free_keys` whose value is not the run's."""
        then, now = dict(_leaves(self.manifest["config"])), dict(_leaves(config))
        changed = [
            f"{key} is {_value(now[key])}, the run has {_value(then[key])}"
            for key in then
            if key in now and now[key] != then[key] and not _is_free(key, free_keys)
        ]
        if changed:
            raise self.refusal(f"other answers would come: {_listed(changed)}. Start a new run for them")

    def check_files(self, now: Mapping[str, Any]) -> None:
        """UsageError where model or input are not, byte for byte, those of the run; see FileHashes."""
        then = self.manifest.get("fingerprint")
        if then is None:  # it died before it had read a row
            return
        if then["input"] is None or now["input"] is None:
            raise self.refusal("its input is standard input or another pipe, which can be read only once")
        changed = file_differences(now, then)
        if changed:
            raise self.refusal(f"other answers would come: {_listed(changed)}")

    def refusal(self, reason: str) -> UsageError:
        there = self.manifest.get("working_directory")
        where = "" if there in (None, os.getcwd()) else f" (the run was started in {there})"
        return UsageError(f"resume={self.given}: {reason}{where}")


@contextmanager
def earlier_run(given: str) -> Iterator[EarlierRun]:
    """The run in this directory, locked until the block ends. UsageError where there is none, or it still goes on."""
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if not path.is_dir():
        raise UsageError(f"resume={given}: no such run directory")
    if not (path / MANIFEST).is_file():
        raise UsageError(f"resume={given}: holds no run ({MANIFEST} is not there)")
    try:
        lock = RunLock(path)
    except Locked:
        raise UsageError(
            f"resume={given}: another process is writing this run (it holds {path / 'lock'}); wait for it or stop it"
        ) from None
    except OSError as error:
        raise UsageError(f"resume={given}: cannot be locked: {error}") from error
    try:
        manifest = _loaded(given, path)  # first: of a later version's run nothing is touched
        _remove_unfinished_files(given, path)
        yield EarlierRun(given, path, manifest)
    finally:
        lock.release()


def _remove_unfinished_files(given: str, path: Path) -> None:
    """What killed attempts were about to write under other names."""
    try:
        for file in (*path.glob(".*.tmp"), *path.glob("records/*/*.tmp")):
            disk.remove(file)
    except OSError as error:
        raise UsageError(f"resume={given}: {error}") from error


def _loaded(given: str, path: Path) -> Manifest:
    try:
        return Manifest.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"resume={given}: {path / MANIFEST} cannot be read: {error}") from error


def _overrides_of(command: Sequence[str]) -> list[str]:
    """Of `python -m MODULE WORDS`."""
    return command_line.parse(command[3:]).overrides


def _is_free(key: str, free_keys: Sequence[str]) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in free_keys)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: object) -> str:
    return "null" if value is None else shown(str(value))


def _listed(items: Sequence[str]) -> str:
    more = f"; and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else ""
    return "; ".join(items[:MAX_SHOWN]) + more


@dataclass(frozen=True, slots=True, kw_only=True)
class Resuming:
    """What a command knows of its runs that `resume=` needs."""

    fingerprint: Callable[[Any], dict[str, Any]]
    """Of a configuration: the files that decide answers, as they are now; reads all of them."""
    settled: Callable[[Path, Manifest], int | None]
    """Of a run that has all of its results: its exit code, the results verified; None where something is left to do."""
    free_keys: Sequence[str]
    """Keys and groups that may differ; any other key decides answers."""
