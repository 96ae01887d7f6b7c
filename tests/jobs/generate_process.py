"""Running jobs.generate, in this process or in one of its own, and reading what a run has left."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.analysis.audit import audit
from jobs.generate_job import BUNDLED_PROMPTS, COMMAND
from jobs.launch import launch
from nanovllm.events import BlockEvent
from tests.engine.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("steps", "block_events", "requests")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has ended."""

    directory: Path
    code: int

    @property
    def manifest(self) -> Row:
        return json.loads((self.directory / "manifest.json").read_text())

    @property
    def log(self) -> str:
        return (self.directory / "run.log").read_text()

    @property
    def generations_bytes(self) -> bytes:
        return (self.directory / "generations.jsonl").read_bytes()

    @property
    def generations(self) -> list[Row]:
        return json_lines(self.directory / "generations.jsonl")

    @property
    def failures(self) -> list[Row]:
        return json_lines(self.directory / "failures.jsonl")

    def table(self, name: str) -> list[Row]:
        return read_table(self.directory, name)


def generate(directory: Path, *words: str) -> Finished:
    """Runs the job in this process, which has torch already, with `directory` for its run directory.

    However it ends, what it has recorded must be sound.
    """
    finished = Finished(directory, launch(COMMAND, ["progress=off", f"hydra.run.dir={directory}", *words]))
    assert_sound(directory)
    return finished


def assert_sound(run_directory: Path) -> None:
    """The audit finds nothing in the records, if there are any."""
    if (run_directory / "records").is_dir():
        found = audit(run_directory)
        assert found.first is None, str(found)


def start(cwd: Path, *words: str, module: str = "jobs.generate", **environment: str) -> subprocess.Popen[str]:
    """Starts the job as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, object] | bytes]) -> Path:
    """A JSONL file of objects, and of lines that are bytes already."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def bundled_rows(count: int) -> list[Row]:
    return json_lines(BUNDLED_PROMPTS)[:count]


def json_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_table(run_directory: Path, name: str) -> list[Row]:
    """All rows of a table of the records, in the order of writing, by pyarrow alone."""
    parts = sorted((run_directory / "records" / name).glob("*.parquet"))
    return [row for part in parts for row in pq.ParquetFile(part).read().to_pylist()]


def block_events(run_directory: Path) -> list[tuple[int, BlockEvent]]:
    """(step, event) of each row of the block_events table."""
    return [
        (row["step"], BlockEvent(*(row[name] for name in BlockEvent._fields)))
        for row in read_table(run_directory, "block_events")
    ]


def replayed(ledger: Ledger, events: Iterable[tuple[int, BlockEvent]]) -> Iterator[int]:
    """Applies the events of one step after the other; yields the step's number when the ledger stands at its end."""
    for step, group in groupby(events, key=lambda row: row[0]):
        for _, event in group:
            ledger.apply(event)
        yield step
