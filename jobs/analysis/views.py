"""The records of one run, or of several, as views that SQL can ask."""

import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.analysis.answers import answer_rows, generations_file
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.tables import read_table
from jobs.record_schemas import TABLES
from jobs.usage import UsageError

ANSWERS = "generations"
RUNS = "runs"
_ANSWER_TYPES = {
    "row": pa.int64(),
    "sample": pa.int64(),
    "id": None,
    "text": pa.string(),
    "token_ids": pa.list_(pa.int64()),
    "finish_reason": pa.string(),
    "num_prompt_tokens": pa.int64(),
    "num_output_tokens": pa.int64(),
}
"""Columns that every generations file has; None where the type is the values' own."""
_MAX_QUOTED = 40
_MAX_ROWS, _MAX_WIDTH, _MAX_CELL, _USUAL_CELL = 200, 100_000, 100, 40
"""What is drawn of an answer: of more it says how many there are, and puts dots."""


_CONFINED = (
    "enable_progress_bar = false",
    "temp_directory = ''",  # else a large sort makes .tmp where the user stands
    "enable_external_access = false",
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "lock_configuration = true",  # last: nothing can be set after it
)


def connect(runs: Sequence[RecordedRun], sql: str = "") -> duckdb.DuckDBPyConnection:
    """A connection with the views steps, block_events, requests, generations and runs.

    Those that `sql` does not name are not read, unless it names none. Every view begins with `run`, the directory's
    name; `runs` has one row a run: its configuration's values and its figures. Columns that a run lacks, such as a kept
    column of another's generations, are null. A query can reach the views alone: no file, no network, no setting.
    """
    connection = duckdb.connect()
    for setting in _CONFINED:
        connection.execute(f"set {setting}")
    names = (*TABLES, ANSWERS, RUNS)
    for name in [name for name in names if name in sql.lower()] or names:
        connection.register(name, _content(runs, name))
    return connection


def _content(runs: Sequence[RecordedRun], name: str) -> pa.Table:
    if name == RUNS:
        return runs_table(runs)
    if name == ANSWERS:
        return _stacked([_with_run(run.path.name, answers_table(run.path)) for run in runs])
    return pa.concat_tables([_with_run(run.path.name, read_table(run.path, name)) for run in runs])


def query(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """What the query answers, as DuckDB draws it; UsageError with DuckDB's message where it cannot."""
    given = " ".join(sql.split())
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise UsageError(f"sql={given}: has {len(statements)} statements, must be one")
        answer = connection.sql(sql)
        return "" if answer is None else _drawn(answer)
    except duckdb.Error as error:
        raise UsageError(f"sql={given}: {_in_one_line(str(error))}{_cure(connection, str(error))}") from error


def _cure(connection: duckdb.DuckDBPyConnection, message: str) -> str:
    """For the commonest mistake: a key of the configuration, taken for a column of another table."""
    taken_for_table = re.search(r'Referenced table "(\w+)" not found', message)
    if taken_for_table is None:
        return ""
    columns = connection.execute("select column_name from information_schema.columns").fetchall()
    keys = sorted({name for (name,) in columns if name.startswith(f"{taken_for_table[1]}.")})
    return f'; the name of such a column stands in double quotes: "{keys[0]}"' if keys else ""


def _in_one_line(message: str) -> str:
    """DuckDB draws a caret under the place; here the place is quoted."""
    reason, _, drawn = message.partition("\n\nLINE ")
    number, _, below = drawn.partition(": ")
    line, _, caret = below.partition("\n")
    place = caret.find("^") - len(f"LINE {number}: ")
    where = f" (line {number}, at {line[place : place + _MAX_QUOTED]!r})" if place >= 0 else ""
    return " ".join(reason.split()) + where


def _drawn(answer: duckdb.DuckDBPyRelation) -> str:
    text = StringIO()
    with redirect_stdout(text):
        num_columns = len(answer.columns)
        # Beside other columns, thousands of token ids would push these out of sight.
        width = _MAX_WIDTH if num_columns == 1 else _MAX_CELL * 2 + _USUAL_CELL * num_columns
        answer.show(max_rows=_MAX_ROWS, max_width=width, max_col_width=_MAX_WIDTH if num_columns == 1 else _MAX_CELL)
    return text.getvalue()


def runs_table(runs: Sequence[RecordedRun]) -> pa.Table:
    """One row for each run: run, path, status, each value of its configuration under its key, and its figures."""
    rows = []
    for run in runs:
        row: dict[str, object] = {"run": run.path.name, "path": str(run.path), "status": run.status}
        row |= {key: _plain(value) for key, value in flat_config(run).items()}
        row |= RunFigures.of(run).facts()
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def flat_config(run: RecordedRun) -> dict[str, object]:
    """The configuration's values by their whole key, such as kv.block_size."""
    found: dict[str, object] = {}

    def walk(prefix: str, node: object) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            found[prefix] = node

    walk("", run.manifest.get("config") or {})
    return found


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _column(values: list[object], kind: pa.DataType | None = None) -> pa.Array:
    """Of the values' own type if they have one, else their texts."""
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])


def _with_run(name: str, table: pa.Table) -> pa.Table:
    return table.add_column(0, "run", pa.array([name] * table.num_rows, pa.string()))


def answers_table(run: Path) -> pa.Table:
    """The generations with all their columns, of a run that is complete or not."""
    path = generations_file(run)
    if path is not None and path.suffix == ".parquet":
        return pq.read_table(path)
    # Through our reader and not DuckDB's: of a run that was killed the last line may be torn.
    rows = [] if path is None else list(answer_rows(path))
    names = list(dict.fromkeys([*_ANSWER_TYPES, *(name for row in rows for name in row)]))
    return pa.table({name: _column([row.get(name) for row in rows], _ANSWER_TYPES.get(name)) for name in names})


def _stacked(tables: list[pa.Table]) -> pa.Table:
    """Of runs that may have kept different columns; a column of several types becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        names = list(dict.fromkeys(name for table in tables for name in table.column_names))
        rows = [row for table in tables for row in table.to_pylist()]
        return pa.table({name: _column([row.get(name) for row in rows]) for name in names})
