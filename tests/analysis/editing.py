"""Changing what a run has recorded: a fault that is seeded, a version that is older or newer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.record_schemas import SCHEMAS

Row = dict[str, Any]


def copied(run: Path, directory: Path) -> Path:
    shutil.copytree(run, directory)
    return directory


def rows_of(run: Path, table: str) -> list[Row]:
    parts = sorted((run / "records" / table).glob("*.parquet"))
    return [row for part in parts for row in pq.ParquetFile(part).read().to_pylist()]


def write_table(run: Path, table: str, rows: list[Row], schema: pa.Schema | None = None) -> None:
    """Puts one part in the place of all."""
    directory = run / "records" / table
    for part in directory.glob("*.parquet"):
        part.unlink()
    pq.write_table(pa.Table.from_pylist(rows, schema or SCHEMAS[table]), directory / "a0000-r0000-00000000.parquet")


def edit(run: Path, table: str, change: Callable[[list[Row]], Any]) -> None:
    """`change` gets the table's rows and alters them in place."""
    rows = rows_of(run, table)
    change(rows)
    write_table(run, table, rows)


def edit_answers(run: Path, change: Callable[[list[Row]], Any]) -> None:
    path = run / "generations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def edit_manifest(run: Path, change: Callable[[Row], Any]) -> None:
    path = run / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
