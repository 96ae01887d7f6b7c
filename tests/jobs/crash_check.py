"""What must hold of a run directory after a crash, and after the run is complete; reads the files by its own means."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow.parquet as pq

from tests.jobs.scripted_job import without_attempt

TABLES = ("steps", "block_events", "requests")
Acks = dict[tuple[str, int], bytes]
"""Acknowledged lines by log (generations or failures) and row, as they will stand in the final file."""


class Broken(AssertionError):
    """A promise was not kept."""


def ensure(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


def check_after_crash(directory: Path, acks: Acks, reference: dict[str, bytes]) -> None:
    """At any instant: what is visible is whole, and every acknowledged row is there with the records of its steps."""
    if (directory / "manifest.json").exists():
        json.loads((directory / "manifest.json").read_bytes())
    for part in directory.glob("records/*/*.parquet"):
        pq.read_metadata(part)
    for name, expected in reference.items():
        path = directory / name
        if path.exists():
            ensure(without_attempt(path.read_bytes()) == expected, f"{name} is visible and not what it must be")
    check_acknowledged(directory, acks)
    check_records(directory, [row for name, row in acks if name == "generations"])


def check_acknowledged(directory: Path, acks: Acks) -> None:
    there = {("generations", row): line for row, line in lines_of(directory, "generations").items()}
    there |= {("failures", row): line for row, line in lines_of(directory, "failures").items()}
    for key, line in acks.items():
        ensure(key in there, f"acknowledged and lost: {key}")
        ensure(there[key] == line, f"acknowledged and changed: {key}: {line!r} became {there[key]!r}")


def lines_of(directory: Path, name: str) -> dict[int, bytes]:
    """The final file's lines by row or, where there is none, the whole lines at the start of the partial one."""
    final, partial = directory / f"{name}.jsonl", directory / f"{name}.partial.jsonl"
    if partial.exists():
        lines = _whole_lines(partial.read_bytes())
    else:
        lines = final.read_bytes().splitlines(keepends=True) if final.exists() else []
    keys = Counter(json.loads(line)["row"] for line in lines)
    twice = [row for row, count in keys.items() if count > 1]
    ensure(not twice, f"{name}: rows {twice} stand there twice")
    return {json.loads(line)["row"]: line for line in lines}


def _whole_lines(data: bytes) -> list[bytes]:
    lines = []
    for line in data.splitlines(keepends=True):
        found = re.fullmatch(rb'(.*),"crc32":"([0-9a-f]{8})"\}\n', line, re.DOTALL)
        if found is None or crc32(found[1]) != int(found[2], 16):
            break
        lines.append(found[1] + b"}\n")
    return lines


def read_table(directory: Path, table: str) -> list[dict[str, Any]]:
    parts = sorted(directory.glob(f"records/{table}/*.parquet"))
    return [row for part in parts for row in pq.ParquetFile(part, pre_buffer=False).read(use_threads=False).to_pylist()]


def check_records(directory: Path, rows: list[int]) -> None:
    """Every one of these rows has a request, and every token of it a step, in the records."""
    if not rows or not (directory / "records").exists():
        return
    sampled: Counter[int] = Counter()
    for step in read_table(directory, "steps"):
        sampled.update(s for s, has_sampled in zip(step["seq_ids"], step["seq_sampled"], strict=True) if has_sampled)
        sampled.subtract(step["dropped_seq_ids"])
    whole = {
        request["row"]
        for request in read_table(directory, "requests")
        if request["finish_reason"] in ("stop", "length") and sampled[request["seq_id"]] == request["num_output_tokens"]
    }
    ensure(set(rows) <= whole, f"acknowledged without the records of their steps: {sorted(set(rows) - whole)}")


def check_complete(directory: Path, acks: Acks, reference: dict[str, bytes]) -> None:
    """At the end: byte for byte the reference, nothing left over, numbers that go on over the attempts."""
    check_after_crash(directory, acks, reference)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    ensure(manifest["status"] == "complete", f"the manifest says {manifest['status']}")
    for name in reference:
        ensure((directory / name).exists(), f"{name} is missing")
    left = [str(path) for path in directory.rglob("*") if path.name.endswith(".tmp") or ".partial." in path.name]
    ensure(not left, f"left over: {left}")
    steps, attempts = read_table(directory, "steps"), manifest["attempts"]
    numbers = [step["step"] for step in steps]
    ensure(numbers == list(range(len(numbers))), f"steps have gaps or repeat: {numbers}")
    ensure([a["attempt"] for a in attempts] == list(range(len(attempts))), "attempts are not counted")
    by_attempt: dict[int, set[int]] = {}
    for step in steps:
        by_attempt.setdefault(step["attempt"], set()).update(step["seq_ids"])
    ids = [seq_id for used in by_attempt.values() for seq_id in used]
    ensure(len(ids) == len(set(ids)), "a seq_id was used in two attempts")
    ends = [step["end_ns"] for step in steps]
    ensure(ends == sorted(ends), "times do not go on over the attempts")
