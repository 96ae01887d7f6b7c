import datetime
import decimal
import gzip
import hashlib
import io
import json
import os
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import reader
from jobs.reader import InputError, InputFile, RowReader, check_input
from jobs.rows import MAX_LINE_BYTES, BadRow, InputRow

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


def test_line_ends_byte_order_mark_and_empty_lines_are_no_part_of_rows(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf\r\n{"prompt": "a"}\r\n\n  \t \r\n{"prompt": "b\\n"}\n\n{"prompt": "c\xe2\x80\xa8\xc2\x85"}'
    rows = read(write(tmp_path / "in.jsonl", lines))
    assert prompts(rows) == ["a", "b\n", "c\u2028\x85"]
    assert [(row.row, row.line) for row in rows] == [(0, 2), (1, 5), (2, 7)]
    rows = read(write(tmp_path / "in.jsonl", b"\xef\xbb\xbf" + LINE.strip()))
    assert prompts(rows) == ["hi"]


def test_row_numbers_go_on_over_files_and_count_bad_rows(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", b"{oops\n", LINE)
    write(tmp_path / "a.json", LINE, b"\n", b'{"prompt": ""}\n', LINE)
    write(tmp_path / "c.jsonl", b"")
    write_parquet(tmp_path / "d.parquet", prompt=["x", "", "y"])
    (tmp_path / "directory.jsonl").mkdir()
    rows = read(tmp_path / "*")
    assert [row.row for row in rows] == list(range(8))
    assert [Path(row.file).name for row in rows] == ["a.json"] * 3 + ["b.jsonl"] * 2 + ["d.parquet"] * 3
    assert [row.line for row in rows] == [1, 3, 4, 1, 2, 1, 2, 3]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False, True, False, False, True, False]
    assert RowReader(str(tmp_path / "*")).count() == 8


def test_limit_stops_after_so_many_rows_over_all_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINE, b"{bad\n", b"\n", LINE)
    write_parquet(tmp_path / "b.parquet", prompt=["x", "y"])
    for limit in (1, 2, 3, 4, 5, 6):
        source = RowReader(str(tmp_path / "*"), limit=limit)
        assert [row.row for row in source] == list(range(min(limit, 5)))
        assert source.count() == min(limit, 5)
    with pytest.raises(ValueError, match=r"reader\.limit=0"):
        RowReader(str(tmp_path / "*"), limit=0)


def test_files_tell_what_was_read(tmp_path: Path) -> None:
    data = LINE + b"\n" + LINE * 3 + b"\n\n"
    path = write(tmp_path / "a.jsonl", data)
    source = RowReader(path)
    assert source.files == ()
    for _ in range(2):  # a second iteration starts again
        list(source)
        assert source.files == (InputFile(path=path, num_rows=4, num_bytes=len(data), sha256=digest(data)),)
    limited = RowReader(path, limit=2)
    list(limited)
    begin = LINE + b"\n" + LINE
    assert limited.files == (InputFile(path=path, num_rows=2, num_bytes=len(begin), sha256=digest(begin)),)
    parquet = Path(write_parquet(tmp_path / "a.parquet", prompt=["x", "y"]))
    source = RowReader(str(parquet), limit=1)
    list(source)
    whole = parquet.read_bytes()
    assert source.files == (InputFile(path=str(parquet), num_rows=1, num_bytes=len(whole), sha256=digest(whole)),)


def test_an_iteration_that_is_given_up_tells_what_was_read(tmp_path: Path) -> None:
    source = RowReader(write(tmp_path / "a.jsonl", LINE * 3))
    rows = iter(source)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert [(file.num_rows, file.sha256) for file in source.files] == [(1, digest(LINE))]


def test_standard_input_is_read_as_it_comes() -> None:
    class Trickle(io.RawIOBase):
        def __init__(self, pieces: list[bytes]) -> None:
            self.pieces = pieces

        def read1(self, size: int) -> bytes:
            return self.pieces.pop(0) if self.pieces else b""

    stdin = Trickle([b'{"prom', b'pt": "a"}', b'\n{"prompt": "b"}\n{"prompt"', b': "c"}'])
    source = RowReader("-", stdin=stdin)
    source.check()
    assert source.count() is None
    rows = iter(source)
    assert prompts([next(rows)]) == ["a"]
    assert len(stdin.pieces) == 1, "the first row must not wait for the rest"
    assert prompts(list(rows)) == ["b", "c"]
    assert [(file.path, file.num_rows) for file in source.files] == [("-", 3)]


def test_lines_may_be_cut_anywhere_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\xef\xbb\xbf" + b"".join(f'{{"prompt": "{"ä" * i}x"}}\r\n\n'.encode() for i in range(20))
    path = write(tmp_path / "in.jsonl", data)
    expected = ["ä" * i + "x" for i in range(20)]
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr(reader, "_CHUNK_BYTES", size)
        source = RowReader(path)
        assert prompts(list(source)) == expected
        assert source.files[0].sha256 == digest(data)


def test_a_line_that_is_too_long_is_one_bad_row_between_good_ones(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}\n'
    blank = b" " * (MAX_LINE_BYTES + 1) + LINE
    path = write(tmp_path / "in.jsonl", LINE, long, LINE, blank, b"\n", LINE)
    tracemalloc.start()
    rows = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.code if isinstance(row, BadRow) else "" for row in rows] == [
        "",
        "line_too_long",
        "",
        "line_too_long",
        "",
    ]
    assert [row.line for row in rows] == [1, 2, 3, 4, 6]
    assert peak < 2.5 * MAX_LINE_BYTES
    assert RowReader(path).count() == 5


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", (b'{"prompt": "%s"}\n' % (b"x" * 1000)) * 20_000)
    tracemalloc.start()
    assert sum(1 for _ in RowReader(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 1024 * 1024


def test_count_in_is_count_out_whatever_the_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [b"{", b"}", b'"', b"\\ud800", b"\xff", b" ", b"\r", b"NaN", b'{"prompt": "a"}', b"\x00", b"\xef\xbb\xbf"]
    lines = [b"".join(rng.choices(words, k=rng.randint(0, 4))) for _ in range(5000)]
    path = write(tmp_path / "in.jsonl", LINE, b"\n".join(lines))
    source = RowReader(path)
    rows = list(source)
    assert len(rows) == 1 + sum(1 for line in lines if line.strip()) == source.count()
    assert [row.row for row in rows] == list(range(len(rows)))


# Inputs that are refused


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"text,label\nhello,1\n", r'is not JSONL: .*the line begins "text,label"'),
        (gzip.compress(LINE), "compressed with gzip: .*zcat"),
        (b"\x28\xb5\x2f\xfd\x00\xff", "zstd"),
        (b"PK\x03\x04\xff", "zip archive"),
        (b"PAR1\xff\xffPAR1", "Parquet: give it a name"),
        ('{"prompt": "hi"}\n'.encode("utf-16"), "UTF-16: save it as UTF-8"),
        (b'[{"prompt": "hi"}]', "JSON array: .*jq -c"),
        (b'[\n{"prompt": "hi"},\n{"prompt": "hi"}\n]', "JSON array"),
        (json.dumps({"a": dict.fromkeys("bcdefghijklmnop", 1)}, indent=2).encode(), "is not JSONL"),
        (b"1\n2\n3\n", "the line is the number 1"),
        (b"plain text\n" * 100 + LINE, "is not JSONL"),
        (b'{"prompt": "cut of', "is not JSONL"),
    ],
    ids=range(12),
)
def test_what_is_no_jsonl_is_refused_with_the_cure(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = write(tmp_path / "in.jsonl", content)
    for attempt in (lambda: check_input(path), lambda: read(path), lambda: read("-", stdin=io.BytesIO(content))):
        with pytest.raises(InputError, match=fragment):
            attempt()
    with pytest.raises(InputError, match=r"input=.*in\.jsonl: "):
        check_input(path)


@pytest.mark.parametrize(
    "beginning", [b"{bad\n", b"x\n" * 9, b'{"prompt": "\xff"}\n', b'{"prompt": NaN}\n' * 30, rb'{"prompt": "\ud800"}']
)
def test_bad_rows_at_the_beginning_are_bad_rows(tmp_path: Path, beginning: bytes) -> None:
    path = write(tmp_path / "in.jsonl", beginning, b"\n", b"" if b"\\" in beginning else LINE)
    check_input(path)
    rows = read(path)
    assert len(rows) == RowReader(path).count()
    assert isinstance(rows[0], BadRow)


def test_an_input_without_rows_is_legal(tmp_path: Path) -> None:
    for path in (
        write(tmp_path / "a.jsonl", b"\n \n"),
        write_parquet(tmp_path / "a.parquet", prompt=pa.array([], "string")),
    ):
        check_input(path)
        assert read(path) == []
    assert RowReader(path).count() == 0


def test_missing_files_directories_and_empty_globs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    write(tmp_path / "a.jsonl", LINE)
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    cases = {
        "missing.jsonl": r"input=missing\.jsonl: no such file or directory; the working directory is",
        "missing.parquet": "no such file",
        "directory": r"input=directory: is a directory; name a file or a glob such as 'directory/\*\.jsonl'",
        "no*.jsonl": r"input=no\*\.jsonl: no file matches; the working directory is",
        "dir*": "no file matches",
        "g*.jsonl": r"input=gone\.jsonl: no such file or directory \(matched by g\*\.jsonl\)",
        "a\x00b": "input=a.*null",
    }
    for source, fragment in cases.items():
        with pytest.raises(InputError, match=fragment):
            check_input(source)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.jsonl", LINE)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"in\.jsonl: permission denied"):
        check_input(path)


def test_a_file_with_a_globs_name_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "a1.jsonl", LINE * 2)
    check_input(write(tmp_path / "a[1].jsonl", LINE))
    assert len(read(tmp_path / "a[1].jsonl")) == 1


def test_a_path_that_is_not_utf8_is_text_in_the_rows(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    write(Path(path), LINE)
    assert read(path)[0].file.endswith("/\\xff.jsonl")


def test_check_leaves_a_pipe_unread(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)
    os.write(pipe, LINE)
    source = RowReader(str(path))
    source.check()
    assert source.count() is None
    assert prompts([next(iter(source))]) == ["hi"]
    os.close(pipe)


def test_a_file_that_vanishes_after_the_check_is_an_input_error(tmp_path: Path) -> None:
    for path in (write(tmp_path / "a.jsonl", LINE), write_parquet(tmp_path / "a.parquet", prompt=["x"])):
        source = RowReader(path)
        Path(path).unlink()
        with pytest.raises(InputError, match="no such file"):
            list(source)


def test_a_system_message_for_a_file_of_prompts_is_refused(tmp_path: Path) -> None:
    chat = b'{"messages": [{"role": "user", "content": "hi"}]}\n'
    with pytest.raises(InputError, match=r"reader\.system: .*rows without messages"):
        check_input(write(tmp_path / "in.jsonl", LINE * 20), system="Be brief.")
    check_input(write(tmp_path / "in.jsonl", LINE, chat), system="Be brief.")


def test_a_disk_that_fails_is_no_input_error() -> None:
    class Broken:
        def read1(self, size: int, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        list(RowReader("-", stdin=Broken()))


# Parquet


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


def test_counting_gives_up_where_it_would_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.jsonl", LINE * 3)
    monkeypatch.setattr(reader, "MAX_COUNTED_BYTES", 10)
    assert RowReader(path).count() is None
