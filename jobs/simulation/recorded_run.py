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
from jobs.simulation.settings import Settings
from jobs.usage import UsageError
from nanovllm.runner.graph_sizes import GraphSizes, graph_sizes

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
        self.engine: dict[str, Any] = self.manifest["engine"]
        self.steps = self._read("steps")
        self.requests = self._read("requests")
        if self.steps.num_rows == 0:
            raise self._error("holds no step; was it recorded with recorder=off, or killed at once?")
        if len(np.unique(self.column("replica"))) > 1:
            raise self._error("has several replicas; one engine is simulated")

    @property
    def on_gpu(self) -> bool:
        return self.engine["device"] != "cpu"

    @property
    def lookahead(self) -> int:
        """As ModelRunner.lookahead: on a GPU the next step is scheduled while one runs."""
        return 1 if self.on_gpu else 0

    @property
    def arrives_by_time(self) -> bool:
        """Whether rows came when they came, from a pipe, rather than as soon as the engine wanted them."""
        return self.manifest["config"].get("input") == "-"

    @property
    def reads_shared_prefixes_once(self) -> bool:
        """Whether attention reads a prefix once for all the rows that share it."""
        return self.engine["attention"].startswith("triton")

    @property
    def suits_halves(self) -> bool:
        """Whether decode steps with enough rows and context run in halves, or would with a larger max_num_seqs."""
        found = self.engine.get("halves")
        return "in halves" in self.engine["cuda_graphs"] if found is None else found  # before `halves` stood there

    @property
    def captures_late(self) -> bool:
        """Whether graphs of steps with prefills are captured when they first come, not at the start: until `halves`
        stood in the manifest."""
        return "halves" not in self.engine

    @property
    def is_whole(self) -> bool:
        """Whether it ran from beginning to end in one attempt."""
        return self.manifest["status"] == COMPLETE and self.num_attempts == 1

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
        return "its rows came by time" if self.arrives_by_time else None

    @property
    def settings(self) -> Settings:
        engine = self.engine
        return Settings(
            block_size=engine["block_size"],
            num_blocks=engine["num_kv_blocks"],
            prefix_caching=engine["enable_prefix_caching"],
            max_num_seqs=engine["max_num_seqs"],
            max_num_batched_tokens=engine["max_num_batched_tokens"],
            max_model_len=engine["max_model_len"],
        )

    def graph_sizes(self, settings: Settings) -> GraphSizes | None:
        """Of this run's runner with other settings; None where it uses no CUDA graphs."""
        if self.engine["cuda_graphs"].startswith("off"):
            return None
        with_prefills = self.reads_shared_prefixes_once  # one kernel's work lists make both possible
        limits = settings.max_num_seqs, settings.max_num_batched_tokens
        return graph_sizes(*limits, with_prefills=with_prefills, with_halves=self.suits_halves)

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
