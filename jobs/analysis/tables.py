"""A table of the records as one Arrow table, of whichever version it was written in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.record_schemas import SCHEMA_VERSION, SCHEMAS
from jobs.usage import UsageError


def read_table(run: Path, table: str) -> pa.Table:
    """All rows of `steps`, `block_events` or `requests`, in the order in which each replica wrote them.

    No rows where the run has written none. UsageError for records of a newer version, and for what is no record.
    """
    schema = SCHEMAS[table]
    parts = sorted((run / "records" / table).glob("*.parquet"))
    tables = [_read_part(part, table, schema) for part in parts]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _read_part(part: Path, table: str, schema: pa.Schema) -> pa.Table:
    try:
        file = pq.ParquetFile(part)
        version = _version(part, file.schema_arrow)
        content = file.read()
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{part}: cannot be read as Parquet: {error}") from error
    for upgrade in UPGRADES.get(table, [])[version - 1 :]:
        content = upgrade(content)
    missing = [name for name in schema.names if name not in content.column_names]
    if missing:
        raise UsageError(f"{part}: lacks the columns {', '.join(missing)} of schema_version {version}")
    return content.select(schema.names).cast(schema)


def _version(part: Path, schema: pa.Schema) -> int:
    text = (schema.metadata or {}).get(b"schema_version", b"").decode(errors="replace")
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{part}: schema_version={text or 'nothing'}: this is no part of a flight recorder's records")
    if int(text) > int(SCHEMA_VERSION):
        raise UsageError(
            f"{part}: schema_version={text} is newer than {SCHEMA_VERSION}, the newest that this version of nanovllm "
            "reads; read the run with the version that wrote it, or a later one"
        )
    return int(text)


def _with_padded_tokens(steps: pa.Table) -> pa.Table:
    """Version 1 did not write what a graph's padding costs. A decode graph's tokens are its sequences; of a graph with
    prefills only the real tokens are known."""
    prefill, decode = values(steps, "num_prefill_tokens"), values(steps, "num_decode_tokens")
    is_padded = values(steps, "cuda_graph") & (prefill == 0)
    padded = np.where(is_padded, values(steps, "padded_batch_size"), prefill + decode)
    return steps.append_column("padded_num_tokens", pa.array(padded, pa.int32()))


def _with_halves(steps: pa.Table) -> pa.Table:
    """Version 2 did not write which decode steps ran in halves: null, where of all others it is known."""
    return steps.append_column("in_halves", pa.nulls(steps.num_rows, pa.bool_()))


Upgrade = Callable[[pa.Table], pa.Table]
UPGRADES: dict[str, list[Upgrade]] = {"steps": [_with_padded_tokens, _with_halves]}
"""For each table: what makes version 2 of version 1, version 3 of version 2, and so on; most versions change one."""


def values(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls."""
    return table[name].to_numpy()


def ints(table: pa.Table, name: str, null: int = -1) -> np.ndarray:
    """An integer column as int64, with `null` for a null."""
    return table[name].fill_null(null).to_numpy().astype(np.int64)


def flags(table: pa.Table, name: str) -> np.ndarray:
    """A boolean column, with False for a null."""
    return table[name].fill_null(False).to_numpy()


def lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(length of each row's list [rows], the lists' values one after the other)."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an older Arrow keeps the chunks of an empty column
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    lengths = np.diff(column.offsets.to_numpy()).astype(np.int64)
    return lengths, column.flatten().to_numpy(zero_copy_only=False)


def codes(table: pa.Table, name: str, words: tuple[str | None, ...]) -> np.ndarray:
    """A string column as places in `words`; -1 for any other word."""
    options = pc.SetLookupOptions(value_set=pa.array(words, pa.string()))
    found = pc.call_function("index_in", [table[name]], options)
    return found.fill_null(-1).to_numpy().astype(np.int8)
