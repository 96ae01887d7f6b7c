"""Finished rows as Parquet: the columns' types from the values that came, the rows in groups of bounded size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = "1"
"""Of the Parquet output, in the file's metadata."""

_ROW_GROUP_BYTES = 16 * 1024 * 1024
_ROW_GROUP_ROWS = 16384
_INT64 = range(-(2**63), 2**63)
_EXACT_IN_FLOAT64 = range(-(2**53), 2**53 + 1)


class Kind(IntFlag):
    """The kinds of values that a column has shown so far."""

    NONE = 0
    STRING = 1
    BOOL = 2
    INTEGER = 4
    LARGE_INTEGER = 8
    """Within 64 bits, but not every such integer is a float."""
    FLOAT = 16
    OTHER = 32


def kind_of(value: object) -> Kind:
    if value is None:
        return Kind.NONE
    if isinstance(value, str):
        return Kind.STRING
    if isinstance(value, bool):
        return Kind.BOOL
    if isinstance(value, int):
        if value in _EXACT_IN_FLOAT64:
            return Kind.INTEGER
        return Kind.LARGE_INTEGER if value in _INT64 else Kind.OTHER
    return Kind.FLOAT if isinstance(value, float) else Kind.OTHER


def _arrow_type(kind: Kind) -> "pa.DataType | None":
    """None for values of several kinds, which become JSON texts."""
    import pyarrow as pa  # 0.2 s that a job without Parquet need not spend

    if kind in (Kind.NONE, Kind.STRING):
        return pa.string()
    if kind == Kind.BOOL:
        return pa.bool_()
    if not kind & ~(Kind.INTEGER | Kind.LARGE_INTEGER):
        return pa.int64()
    if not kind & ~(Kind.INTEGER | Kind.FLOAT):
        return pa.float64()
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetSchema:
    arrow: "pa.Schema"
    ids_as_text: bool
    json_columns: tuple[str, ...]


def parquet_schema(id_kind: Kind, column_kinds: Mapping[str, Kind]) -> ParquetSchema:
    import pyarrow as pa

    ids_as_text = bool(id_kind & Kind.STRING)
    kept = {name: _arrow_type(kind) for name, kind in column_kinds.items()}
    arrow = pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            pa.field("id", pa.string() if ids_as_text else pa.int64(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("finish_reason", pa.string(), nullable=False),
            pa.field("num_prompt_tokens", pa.int32(), nullable=False),
            pa.field("num_output_tokens", pa.int32(), nullable=False),
            pa.field("logprobs", pa.null()),
            *(pa.field(name, type or pa.string()) for name, type in kept.items()),
        ],
        metadata={"schema_version": SCHEMA_VERSION},
    )
    json_columns = tuple(name for name, type in kept.items() if type is None)
    return ParquetSchema(arrow=arrow, ids_as_text=ids_as_text, json_columns=json_columns)


def write_parquet(file: BinaryIO, lines: Iterator[bytes], schema: ParquetSchema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema.arrow, compression="zstd") as writer:
        for group in _groups(lines):
            records = [_parquet_record(record, schema) for record in group]
            writer.write_table(pa.Table.from_pylist(records, schema=schema.arrow))


def count_parquet_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def _groups(lines: Iterator[bytes]) -> Iterator[list[dict[str, object]]]:
    """Decoded lines, in groups that are bounded in rows and in bytes."""
    decode = msgspec.json.Decoder(dict[str, object]).decode
    group: list[dict[str, object]] = []
    num_bytes = 0
    for line in lines:
        group.append(decode(line))
        num_bytes += len(line)
        if len(group) == _ROW_GROUP_ROWS or num_bytes >= _ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _parquet_record(record: dict[str, object], schema: ParquetSchema) -> dict[str, object]:
    if schema.ids_as_text:
        record["id"] = str(record["id"])
    for name in schema.json_columns:
        if record[name] is not None:
            record[name] = msgspec.json.encode(record[name]).decode("utf-8")
    return record
