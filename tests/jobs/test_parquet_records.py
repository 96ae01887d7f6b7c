import datetime
import decimal
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.reader import InputError, RowReader, check_input
from jobs.rows import BadRow, InputRow
from tests.jobs.inputs import LINE, prompts, read, write, write_parquet


def test_parquet_rows_have_every_prompt_form(tmp_path: Path) -> None:
    message = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()}))
    body = {"model": "m", "prompt": "done", "max_tokens": 3, "temperature": None}
    path = write_parquet(
        tmp_path / "in.parquet",
        prompt=pa.array(["hi", None, None, None, ""], pa.large_string()),
        messages=pa.array([None, [{"role": "user", "content": "hey"}], None, None, None], message),
        prompt_token_ids=pa.array([None, None, [1, 2], None, None], pa.list_(pa.int32())),
        custom_id=pa.array([None, None, None, "c", None]),
        body=pa.array([None, None, None, body, None]),
        id=pa.array([7, None, 9, 10, 11], pa.uint64()),
        sampling=pa.array([{"temperature": 0.5, "top_k": None}, None, None, None, None]),
        unused=pa.array([b"\xff"] * 5),
        kept=pa.array([{"a": [1]}, None, None, None, None]),
    )
    rows = read(path, keep=["kept"])
    assert [row.id for row in rows] == [7, 1, 9, "c", 11]
    first, second, third, fourth = (row for row in rows if isinstance(row, InputRow))
    assert (first.prompt, first.columns, first.sampling and first.sampling.temperature) == (
        "hi",
        {"kept": {"a": [1]}},
        0.5,
    )
    assert second.messages == [{"role": "user", "content": "hey"}]
    assert third.prompt_token_ids == [1, 2]
    assert (fourth.prompt, fourth.sampling and fourth.sampling.max_tokens) == ("done", 3)
    assert isinstance(rows[4], BadRow)
    assert (rows[4].code, rows[4].line, rows[4].row) == ("empty_prompt", 5, 4)


def test_parquet_takes_templates_and_limits_over_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"n": range(5000), "t": ["x"] * 5000}), path, row_group_size=700)
    rows = read(path, prompt="{t}{n}", limit=3000)
    assert prompts(rows) == [f"x{n}" for n in range(3000)]
    assert [row.line for row in rows] == list(range(1, 3001))
    assert RowReader(str(path), prompt="t").count() == 5000


def test_parquet_columns_that_json_lacks_become_text_or_are_refused(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "in.parquet",
        prompt=["hi"],
        day=[datetime.date(2026, 11, 23)],
        time=pa.array([1], pa.timestamp("ns")),
        price=[decimal.Decimal("1.50")],
        bytes=[b"x"],
        kinds=pa.array(["a"]).dictionary_encode(),
        deep=pa.array([[{"a": 1}]], pa.list_(pa.struct({"a": pa.date32()}))),
    )
    (row,) = read(path, keep=["day", "time", "price", "kinds"])
    assert isinstance(row, InputRow)
    assert row.columns["day"] == "2026-11-23"
    assert str(row.columns["time"]).startswith("1970-01-01 00:00:00.000000001")
    assert (row.columns["price"], row.columns["kinds"]) == ("1.50", "a")
    for name in ("bytes", "deep"):
        with pytest.raises(InputError, match=rf"column {name} \(writer\.keep\) is .*, which is not JSON"):
            check_input(path, keep=[name])


def test_parquet_strings_that_are_not_utf8_are_bad_rows(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", b"fine"]).view(pa.string())
    rows = read(write_parquet(tmp_path / "in.parquet", prompt=raw))
    assert prompts(rows) == ["good", None, "fine"]
    assert isinstance(rows[1], BadRow)
    assert rows[1].code == "not_utf8"


def test_parquet_values_that_python_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    spans = pa.array([1, 2**62, 2], pa.duration("s"))
    rows = read(write_parquet(tmp_path / "in.parquet", prompt=["a", "b", "c"], id=spans))
    assert [row.code for row in rows if isinstance(row, BadRow)] == ["bad_id", "bad_value", "bad_id"]


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", LINE * 10)
    for attempt in (lambda: check_input(path), lambda: read(path), lambda: RowReader(path).count()):
        with pytest.raises(InputError, match=r"in\.parquet: is not a Parquet file .* if it is JSONL, give it a name"):
            attempt()
    good = write_parquet(tmp_path / "good.parquet", text=["x"])
    with pytest.raises(InputError, match=r"no column prompt, .*; its columns are text; reader\.prompt=COLUMN"):
        check_input(good)
    with pytest.raises(InputError, match=r"no column txt \(reader\.prompt\); its columns are text"):
        check_input(good, prompt="{txt}")
    with pytest.raises(InputError, match=r"no column label \(writer\.keep\)"):
        check_input(good, prompt="text", keep=["label"])
    check_input(good, prompt="text", keep=["text"])


def test_damaged_parquet_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": [os.urandom(50).hex() for _ in range(5000)]}), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"in\.parquet: cannot be read behind record \d+"):
        read(path)
