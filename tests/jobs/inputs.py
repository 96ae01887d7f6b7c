"""Input files for tests, and what is read of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.reader import RowReader
from jobs.rows import BadRow, InputRow

LINE = b'{"prompt": "hi"}\n'


def write(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"".join(lines))
    return str(path)


def write_parquet(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(source: str | Path, **settings) -> list[InputRow | BadRow]:
    return list(RowReader(str(source), **settings))


def prompts(rows: Sequence[InputRow | BadRow]) -> list[str | None]:
    return [row.prompt if isinstance(row, InputRow) else None for row in rows]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
