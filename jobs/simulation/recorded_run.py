"""A run as its directory tells it: what a simulation starts from."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.analysis.tables import read_table
from jobs.manifest import COMPLETE, NAME, check_version, is_recorded
from jobs.simulation.run_facts import RunFacts
from jobs.usage import UsageError

PHASES_OUTSIDE = ("load", "capture", "write", "finish")


@dataclass(frozen=True, slots=True)
class Phase:
    """Of the manifest; nanoseconds of the run's clock."""

    name: str
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, slots=True)
class _Attempt:
    number: int
    phases: list[Phase]


class RecordedRun:
    """Manifest and tables of one run, complete or not. UsageError where they do not allow a simulation."""

    def __init__(self, key: str, directory: Path) -> None:
        self.directory = directory
        self._key = key
        self.manifest = self._read_manifest()
        if "engine" not in self.manifest:
            raise self._error("its manifest has no `engine`: the run ended before its engine was built")
        self.facts = RunFacts.of(self.manifest)
        self.steps = self._read("steps")
        self.requests = self._read("requests")
        if self.steps.num_rows == 0:
            raise self._error("holds no step; was it recorded with recorder=off, or killed at once?")
        if len(np.unique(self.column("replica"))) > 1:
            raise self._error("has several replicas; one engine is simulated")

    @property
    def num_attempts(self) -> int:
        return len(self.manifest["attempts"])

    @property
    def num_unrecorded_attempts(self) -> int:
        return self.num_attempts - len(self._attempts)

    @property
    def can_be_compared(self) -> bool:
        """Whether a simulation can do just what the run did."""
        return self.why_not_compared is None

    @property
    def why_not_compared(self) -> str | None:
        """What keeps a simulation from doing just what the run did, if anything does."""
        if self.manifest["status"] != COMPLETE:
            return f"it is not complete; its status is {self.manifest['status']}"
        if self.num_attempts > 1:
            return f"it took {self.num_attempts} attempts"
        return "its rows came by time" if self.facts.arrives_by_time else None

    def block_events(self) -> pa.Table:
        return self._read("block_events")

    def column(self, name: str) -> np.ndarray:
        """A column of the steps without nulls."""
        return self.steps[name].to_numpy()

    def lists(self, name: str) -> np.ndarray:
        """A column of lists of the steps, one step's values after the other's."""
        return pa.concat_arrays([chunk.flatten() for chunk in self.steps[name].chunks]).to_numpy(zero_copy_only=False)

    def seconds_of(self, *names: str) -> float:
        """What phases of these names took together, in the last attempt that was recorded and has any."""
        last = self._last_attempt
        return sum(phase.seconds for phase in last.phases if phase.name in names) if last else 0.0

    @property
    def around_seconds(self) -> float:
        """What the same attempt was generating before its first step and behind its last one."""
        last = self._last_attempt
        return max(self.seconds_of("generate") - self._steps_seconds.get(last.number, 0.0), 0.0) if last else 0.0

    @property
    def steps_seconds(self) -> float:
        """From the first step's start to the last one's end; of several attempts the sum."""
        return sum(self._steps_seconds.values())

    @property
    def job_seconds(self) -> float | None:
        """All phases of the attempts whose steps `steps_seconds` has; None where no phase has ended.

        A killed attempt never ended its phase of generating: its steps stand for it.
        """
        attempts = [attempt for attempt in self._attempts if attempt.phases or attempt.number in self._steps_seconds]
        if not any(attempt.phases for attempt in attempts):
            return None
        seconds = sum(phase.seconds for attempt in attempts for phase in attempt.phases)
        without = [a for a in attempts if all(phase.name != "generate" for phase in a.phases)]
        return seconds + sum(self._steps_seconds.get(attempt.number, 0.0) for attempt in without)

    @cached_property
    def _steps_seconds(self) -> dict[int, float]:
        """By attempt."""
        starts, ends, attempts = self.column("start_ns"), self.column("end_ns"), self.column("attempt")
        return {
            int(a): float(ends[attempts == a].max() - starts[attempts == a].min()) / 1e9 for a in np.unique(attempts)
        }

    @property
    def _last_attempt(self) -> "_Attempt | None":
        return next((attempt for attempt in reversed(self._attempts) if attempt.phases), None)

    @cached_property
    def _attempts(self) -> "list[_Attempt]":
        """Those that were recorded."""
        return [
            _Attempt(
                found["attempt"],
                [Phase(phase["name"], phase["start_ns"], phase["end_ns"]) for phase in found["phases"]],
            )
            for found in self.manifest["attempts"]
            if is_recorded(found, self.manifest["config"])
        ]

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / NAME
        if not path.is_file():
            raise self._error(f"is no run directory: it has no {NAME}")
        try:
            content = json.loads(path.read_bytes())
            check_version(content)
        except (ValueError, OSError) as error:
            raise self._error(f"its {NAME} cannot be read: {error}") from error
        missing = [name for name in ("config", "status", "attempts") if name not in content]
        if missing:
            raise self._error(f"its {NAME} lacks {', '.join(missing)}")
        return content

    def _read(self, table: str) -> pa.Table:
        return read_table(self.directory, table)

    def _error(self, message: str) -> UsageError:
        return UsageError(f"{self._key}={self.directory}: {message}")
