"""Parquet parts of one table: each is written under another name, made durable, and only then gets its own."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import disk
from jobs.record_schemas import SCHEMAS, TABLES


class PartWriter:
    """Writes a table's parts for one attempt of one replica.

    A file whose name ends in .parquet is whole at any instant, after SIGKILL and after a loss of power. Names sort in
    the order of writing, over attempts too; replicas write side by side. Making a PartWriter removes what a killed
    one of the same replica left unfinished; it never overwrites a part.
    """

    def __init__(self, records: Path, table: str, *, replica: int, attempt: int, durable: bool = True) -> None:
        """Without `durable`, parts are whole but may be lost with the machine."""
        self._directory = records / table
        self._schema = SCHEMAS[table]
        self._prefix = f"a{attempt:04d}-r{replica:04d}-"
        self._num_parts = 0
        self._durable = durable
        _make_directories(self._directory)
        if any(self._directory.glob(f"{self._prefix}*.parquet")):
            raise FileExistsError(f"{self._directory} already has records of replica {replica}, attempt {attempt}")
        for unfinished in self._directory.glob(f"a*-r{replica:04d}-*.tmp"):
            disk.remove(unfinished)

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        """One more part, possibly without rows; it is there when this returns."""
        part = self._directory / f"{self._prefix}{self._num_parts:08d}.parquet"
        table = pa.Table.from_batches(batches, self._schema)
        encoded = pa.BufferOutputStream()
        # zstd alone: dictionaries would double the time and spare little, because batches repeat from step to step.
        pq.write_table(table, encoded, compression="zstd", use_dictionary=False)
        data = memoryview(encoded.getvalue())
        disk.replace(
            part,
            lambda file: file.write(data),
            lambda path: None,
            beside=part.with_name(part.name + ".tmp"),
            durable=self._durable,
        )
        self._num_parts += 1


def read_records(run_directory: Path, table: str) -> pa.Table:
    """All rows of `steps`, `block_events` or `requests`, in the order in which each replica wrote them."""
    if table not in TABLES:
        raise ValueError(f"table={table}: must be one of {', '.join(TABLES)}")
    parts = sorted((run_directory / "records" / table).glob("*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{run_directory} has no records/{table}/*.parquet")
    return pa.concat_tables([pq.ParquetFile(part).read() for part in parts])


def parts_of(run_directory: Path, table: str) -> Iterator[pq.FileMetaData]:
    """The footers of a table's parts, in the order of their names; none where the run has no records."""
    for part in sorted((run_directory / "records" / table).glob("*.parquet")):
        yield pq.read_metadata(part)


def _make_directories(path: Path) -> None:
    for directory in (path.parent.parent, path.parent, path):
        with contextlib.suppress(FileExistsError):
            disk.make_directory(directory)
