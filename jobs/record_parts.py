"""Parquet parts of one table: each is written under another name, made durable, and only then gets its own."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.record_schemas import SCHEMAS, TABLES


class PartWriter:
    """Writes a table's parts for one attempt of one replica.

    A file whose name ends in .parquet is whole at any instant, after SIGKILL and after a loss of power. Names sort in
    the order of writing, over attempts too; replicas write side by side. Making a PartWriter removes what a killed
    one of the same replica left unfinished; it never overwrites a part.
    """

    def __init__(self, records: Path, table: str, *, replica: int, attempt: int) -> None:
        self._directory = records / table
        self._schema = SCHEMAS[table]
        self._prefix = f"a{attempt:04d}-r{replica:04d}-"
        self._num_parts = 0
        self._directory.mkdir(parents=True, exist_ok=True)
        if any(self._directory.glob(f"{self._prefix}*.parquet")):
            raise FileExistsError(f"{self._directory} already has records of replica {replica}, attempt {attempt}")
        for unfinished in self._directory.glob(f"a*-r{replica:04d}-*.tmp"):
            unfinished.unlink()

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        """One more part, possibly without rows; it is there, durably, when this returns."""
        part = self._directory / f"{self._prefix}{self._num_parts:08d}.parquet"
        unfinished = part.with_name(part.name + ".tmp")
        table = pa.Table.from_batches(batches, self._schema)
        # zstd alone: dictionaries would double the time and spare little, because batches repeat from step to step.
        pq.write_table(table, str(unfinished), compression="zstd", use_dictionary=False)
        _sync(unfinished)
        os.rename(unfinished, part)
        _sync(self._directory)
        self._num_parts += 1


def read_records(run_directory: Path, table: str) -> pa.Table:
    """All rows of `steps`, `block_events` or `requests`, in the order in which each replica wrote them."""
    if table not in TABLES:
        raise ValueError(f"table={table}: must be one of {', '.join(TABLES)}")
    parts = sorted((run_directory / "records" / table).glob("*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{run_directory} has no records/{table}/*.parquet")
    return pa.concat_tables([pq.ParquetFile(part).read() for part in parts])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
