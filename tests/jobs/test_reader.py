import io
import random
import tracemalloc
from pathlib import Path

import pytest

from jobs import reader
from jobs.json_line import MAX_LINE_BYTES
from jobs.other_formats import NUM_FIRST_LINES
from jobs.reader import InputFile, RowReader
from jobs.rows import BadRow, InputRow
from tests.jobs.inputs import LINE, digest, prompts, read, write, write_parquet


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
        monkeypatch.setattr("jobs.lines.CHUNK_BYTES", size)
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


def test_counting_gives_up_where_it_would_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.jsonl", LINE * 3)
    monkeypatch.setattr(reader, "MAX_COUNTED_BYTES", 10)
    assert RowReader(path).count() is None


def test_kept_columns_that_no_first_row_has_are_told(tmp_path: Path) -> None:
    late = write(tmp_path / "late.jsonl", LINE * NUM_FIRST_LINES, b'{"prompt":"x","label":1}\n')
    keep = ["lable", "prompt", "label"]
    assert RowReader(late, keep=keep).absent_columns() == ("lable", "label"), "as far as the first rows tell"
    rows = [row for row in read(late, keep=keep) if isinstance(row, InputRow)]
    assert [row.columns["label"] for row in rows] == [None] * NUM_FIRST_LINES + [1]
    early = write(tmp_path / "early.jsonl", b"no row\n", b'{"prompt":"x","label":null}\n{"prompt":"x","label":0}\n')
    assert RowReader(str(tmp_path / "*.jsonl"), keep=keep).absent_columns() == ("lable",)
    assert RowReader(early, keep=["label"]).absent_columns() == ()
    assert RowReader("-", keep=keep, stdin=io.BytesIO(b"")).absent_columns() == ()
