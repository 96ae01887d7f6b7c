"""One run directory, read: manifest, attempts, and the three tables as columns."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.analysis import tables
from jobs.manifest import COMPLETE, FAILED, is_recorded
from jobs.manifest import NAME as MANIFEST
from jobs.manifest import SCHEMA_VERSION as MANIFEST_VERSION
from jobs.usage import UsageError

KILLED = "killed"
"""What an attempt's entry says when a later one has found that it never ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process of the run. Times are nanoseconds since the run's clock_zero."""

    number: int
    started_ns: int
    phases: tuple[tuple[str, int, int], ...]
    """(name, start, end) outside the steps, in the order in which they ended."""
    has_ended: bool
    """Whether it came to an end of its own, and was not killed."""
    is_sealed: bool
    """Whether it ended after it had begun to generate, and closed its records; those of one that was killed, or whose
    disk failed, may stop anywhere."""
    is_recorded: bool
    """False: it ran with recorder=off, and no table has anything of it."""
    last_step: int
    """Where it was not recorded, the last step that it counted; -1 where that is not known."""
    has_failed: bool
    engine: Mapping[str, Any]
    """The engine's settings as they came out; empty where the attempt did not get so far. A resumed run may have others
    than before."""

    def phases_have(self, name: str) -> bool:
        return any(name == found for found, _, _ in self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSequences:
    """The lists of the steps table, flat: one entry for each sequence of each step, in batch order."""

    step_row: np.ndarray
    """Row of the steps table, for each entry; it never decreases."""
    seq_id: np.ndarray
    num_tokens: np.ndarray
    context_len: np.ndarray
    cached_tokens: np.ndarray
    sampled: np.ndarray


class RecordedRun:
    """Reads what it is asked for, once. The run may be under way, complete, killed, or resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _manifest(path)

    @property
    def status(self) -> str:
        return str(self.manifest.get("status"))

    @property
    def is_complete(self) -> bool:
        return self.status == COMPLETE

    @property
    def engine(self) -> Mapping[str, Any]:
        """Of the last attempt that got so far; empty where none did."""
        return next((attempt.engine for attempt in reversed(self.attempts) if attempt.engine), {})

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of the KV cache; where attempts had different ones, of the largest. 0 where no step was recorded."""
        return int((self.step_column("free_blocks") + self.step_column("used_blocks")).max(initial=0))

    @cached_property
    def attempts(self) -> list[Attempt]:
        listed = self.manifest["attempts"]
        zero = datetime.fromisoformat(self.manifest["clock_zero"])
        # What the top level says is the last attempt's, and an earlier one's where it does not say itself.
        last = {"engine": self.manifest.get("engine"), "config": self.manifest.get("config")}
        earlier = [_attempt({"status": None, **last, **found}, zero) for found in listed[:-1]]
        return [*earlier, _attempt({**listed[-1], **last, "status": self.status}, zero)]

    @cached_property
    def steps(self) -> pa.Table:
        return tables.read_table(self.path, "steps")

    @cached_property
    def block_events(self) -> pa.Table:
        return tables.read_table(self.path, "block_events")

    @cached_property
    def requests(self) -> pa.Table:
        return tables.read_table(self.path, "requests")

    @cached_property
    def step_sequences(self) -> StepSequences:
        lengths, seq_ids = tables.lists(self.steps, "seq_ids")
        columns = [seq_ids]
        for name in ("seq_num_tokens", "seq_context_lens", "seq_cached_tokens", "seq_sampled"):
            others, flat = tables.lists(self.steps, name)
            if (others != lengths).any():
                step = int(tables.values(self.steps, "step")[np.flatnonzero(others != lengths)[0]])
                raise UsageError(f"{self.path}: step {step}: {name} and seq_ids differ in length")
            columns.append(flat)
        step_row = np.repeat(np.arange(len(lengths)), lengths)
        ids, num_tokens, context_len, cached, sampled = columns
        return StepSequences(
            step_row=step_row,
            seq_id=ids.astype(np.int64),
            num_tokens=num_tokens.astype(np.int64),
            context_len=context_len.astype(np.int64),
            cached_tokens=cached.astype(np.int64),
            sampled=sampled.astype(np.bool_),
        )

    def step_column(self, name: str) -> np.ndarray:
        return tables.values(self.steps, name)

    @property
    def has_records(self) -> bool:
        return (self.path / "records").is_dir()

    def require_records(self) -> None:
        """UsageError where the run has no records at all."""
        if not self.has_records:
            raise UsageError(f"{self.path}: {self.why_no_records}")

    @property
    def note_on_unrecorded(self) -> str | None:
        """What a reader must know where the run has records, and some of its attempts have none."""
        numbers = [attempt.number for attempt in self.attempts if not attempt.is_recorded]
        if not numbers or not self.has_records:
            return None
        several = "s" if len(numbers) > 1 else ""
        return (
            f"attempt{several} {', '.join(map(str, numbers))} ran with recorder=off: rows, steps and tokens of "
            f"{'these' if several else 'it'} are not in the records"
        )

    @property
    def why_no_records(self) -> str:
        return f"has no records; the run was made with recorder=off, or never began (its status is {self.status})"


def _manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        version = content["schema_version"]
        datetime.fromisoformat(content["clock_zero"])
        for attempt in content["attempts"]:
            datetime.fromisoformat(attempt["started"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / MANIFEST}: is not a run's manifest: {type(error).__name__}: {error}") from error
    if not isinstance(version, int) or version > MANIFEST_VERSION:
        raise UsageError(
            f"{path / MANIFEST}: schema_version={version} is newer than {MANIFEST_VERSION}, the newest that this "
            "version of nanovllm reads; read the run with the version that wrote it, or a later one"
        )
    return content


def _attempt(found: Mapping[str, Any], zero: datetime) -> Attempt:
    phases = tuple((phase["name"], phase["start_ns"], phase["end_ns"]) for phase in found["phases"])
    by_wall_clock = round((datetime.fromisoformat(found["started"]) - zero).total_seconds() * 1e9)
    first = min([by_wall_clock, *(start for _, start, _ in phases)])
    return Attempt(
        number=found["attempt"],
        started_ns=0 if found["attempt"] == 0 else first,
        phases=phases,
        has_ended=found.get("ended") is not None and found["status"] != KILLED,
        is_sealed=found.get("ended") is not None
        and any(name == "generate" for name, _, _ in phases)
        and found.get("sealed", True),
        is_recorded=is_recorded(found, None),
        last_step=found.get("last_step", -1),
        has_failed=found["status"] == FAILED,
        engine=found["engine"] or {},
    )
