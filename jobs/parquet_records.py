"""A Parquet file as records of Python values that JSON has."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.input_paths import InputError, cannot_open, printable
from jobs.refusal import BadRowCode

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BUFFER_BYTES = 1024 * 1024
_RECORDS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A record that pyarrow has, but cannot turn into Python values."""

    code: BadRowCode
    reason: str


@contextmanager
def open_parquet(path: str) -> "Iterator[pq.ParquetFile]":
    """Opens a file to be read in little memory; raises InputError if it is no Parquet."""
    import pyarrow as pa  # 0.2 s that a job on JSONL need not spend
    import pyarrow.parquet as pq

    try:
        # Without pre_buffer, and with a buffer, a column is read page by page instead of a row group at once.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except FileNotFoundError as error:
        raise cannot_open(path, error) from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"input={printable(path)}: is not a Parquet file that can be read ({_first_sentence(error)}); "
            "if it is JSONL, give it a name that ends in .jsonl"
        ) from None
    with file:
        yield file


def read_records(
    path: str, file: "pq.ParquetFile", wanted: frozenset[str]
) -> "Iterator[dict[str, object] | Unreadable]":
    """The records of a file, of its columns the `wanted` ones; raises InputError where the file is damaged."""
    import pyarrow as pa

    columns = [name for name in file.schema_arrow.names if name in wanted]
    batches = file.iter_batches(batch_size=_RECORDS_PER_BATCH, columns=columns, use_threads=False)
    num_read = 0
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch = _without_times(batch)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"input={printable(path)}: cannot be read behind record {num_read}: {_first_sentence(error)}"
            ) from error
        yield from _python_records(batch)
        num_read += batch.num_rows


def _python_records(batch: "pa.RecordBatch") -> "Iterator[dict[str, object] | Unreadable]":
    try:
        records = batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError):
        records = (_python_record(batch.slice(index, 1)) for index in range(batch.num_rows))
    yield from records


def _python_record(record: "pa.RecordBatch") -> dict[str, object] | Unreadable:
    try:
        return record.to_pylist(maps_as_pydicts="lossy")[0]
    except UnicodeDecodeError as error:
        return Unreadable(code=BadRowCode.NOT_UTF8, reason=f"a string of the record is not UTF-8: {error}")
    except (ValueError, OverflowError) as error:
        return Unreadable(code=BadRowCode.BAD_VALUE, reason=f"a value of the record cannot be read: {error}")


def _without_times(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Dates, times and decimals as their text: JSON has none of them."""
    for index, field in enumerate(batch.schema):
        if not is_json_type(field.type) and is_text_castable(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).cast("string"))
    return batch


def is_text_castable(kind: "pa.DataType") -> bool:
    """Whether values of this type come as their text."""
    import pyarrow as pa

    return pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind) or pa.types.is_decimal(kind)


def is_json_type(kind: "pa.DataType") -> bool:
    """Whether values of this type come as what JSON has."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return is_json_type(kind.value_type)
    if types.is_nested(kind):
        return all(is_json_type(kind.field(index).type) for index in range(kind.num_fields))
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
