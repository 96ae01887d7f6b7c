import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.reader import InputError, RowReader, check_input
from jobs.rows import BadRow
from tests.jobs.inputs import LINE, prompts, read, write, write_parquet


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
