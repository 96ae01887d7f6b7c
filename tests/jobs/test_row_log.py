"""The log of finished rows: what it takes for whole, what it cuts off, what it refuses."""

import json
import os
from pathlib import Path

import pytest

from jobs.line_index import RowLogError
from jobs.row_log import RowLog, sealed_line, unsealed_line


def row_line(row: int, sample: int = 0) -> bytes:
    return json.dumps({"row": row, "sample": sample, "text": "ü" * (row % 5)}).encode()


def written(path: Path, *rows: int) -> bytes:
    log = RowLog(path)
    log.add([row_line(row) for row in rows])
    log.flush()
    log.close()
    return path.read_bytes()


def recovered(path: Path) -> list[int]:
    """Its rows as they stand there."""
    seen: list[bytes] = []
    log = RowLog.recover(path, seen.append)
    index = log.index()
    rows = index.rows.tolist()
    assert [json.loads(line)["row"] for line in seen] == rows
    assert [json.loads(line)["row"] for line in log.read(index)] == sorted(rows)
    log.close()
    return rows


def test_a_line_is_json_that_checks_itself():
    sealed = sealed_line(b'{"row":3,"text":"a\\n"}')
    assert json.loads(sealed)["row"] == 3
    assert list(json.loads(sealed)) == ["row", "text", "crc32"]
    assert unsealed_line(sealed) == b'{"row":3,"text":"a\\n"}'


def test_every_changed_byte_of_a_line_is_noticed():
    sealed = sealed_line(b'{"row":3,"text":"abc"}')
    for index in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[index] ^= 1 << bit
            assert unsealed_line(bytes(changed)) is None, f"byte {index}, bit {bit}"
    for end in range(len(sealed)):
        assert unsealed_line(sealed[:end]) is None


def test_rows_count_when_they_are_flushed(tmp_path: Path):
    log = RowLog(tmp_path / "log")
    log.add([row_line(4), row_line(2)])
    assert (log.num_flushed, (tmp_path / "log").read_bytes()) == (0, b"")
    log.flush()
    assert (log.num_flushed, log.index().rows.tolist()) == (2, [4, 2])
    log.close()


@pytest.mark.parametrize("power", [True, False])
def test_a_flush_is_one_write_and_for_power_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: bool):
    log = RowLog(tmp_path / "log", power=power)
    calls: list[str] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: calls.append("write") or write(file, data))
    monkeypatch.setattr(os, "fdatasync", lambda file: calls.append("fdatasync"))
    log.add([row_line(row) for row in range(1000)])
    log.flush()
    log.flush()
    log.close()
    assert calls == (["write", "fdatasync"] if power else ["write"])


def test_what_could_not_be_synced_is_cut_off_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise recovery would find it in the system's cache and take it for durable."""
    path = tmp_path / "log"
    log = RowLog(path)
    log.add([row_line(1)])
    log.flush()
    kept = path.read_bytes()

    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    log.add([row_line(2)])
    with pytest.raises(OSError, match="log"):
        log.flush()
    log.close()
    assert path.read_bytes() == kept


def test_recovery_cuts_a_torn_end_at_every_byte_and_goes_on_there(tmp_path: Path):
    path = tmp_path / "log"
    data = written(path, 5, 0, 7)
    ends = [0, *(index + 1 for index, byte in enumerate(data) if byte == ord("\n"))]
    for cut in range(len(data) + 1):
        for garbage in (b"", b"\0" * 9, b'{"row":9}\n', sealed_line(b'{"row":8}')[:-3]):
            path.write_bytes(data[:cut] + garbage)
            whole = sum(end <= cut for end in ends) - 1
            assert recovered(path) == [5, 0, 7][:whole]
            assert path.read_bytes() == data[: ends[whole]]
            assert recovered(path) == [5, 0, 7][:whole], "a second recovery finds the same"
    log = RowLog.recover(path, len)
    log.add([row_line(1)])
    log.flush()
    log.close()
    assert recovered(path) == [5, 0, 7, 1]


def test_what_comes_behind_a_bad_line_is_cut_off_too(tmp_path: Path):
    path = tmp_path / "log"
    data = written(path, 1, 2, 3)
    second = data.index(b"\n") + 5
    path.write_bytes(data[:second] + b"\0" + data[second + 1 :])
    log = RowLog.recover(path, len)
    assert log.index().rows.tolist() == [1]
    assert log.num_cut_bytes == len(data) - data.index(b"\n") - 1
    log.close()


def test_a_row_that_stands_twice_is_refused(tmp_path: Path):
    path = tmp_path / "log"
    path.write_bytes(written(path, 1, 2) + sealed_line(row_line(1)))
    with pytest.raises(RowLogError, match="row 1, sample 0 was written twice"):
        recovered(path)
    path.write_bytes(b"".join(sealed_line(row_line(1, sample)) for sample in range(3)))
    assert recovered(path) == [1, 1, 1], "several samples of a row are several keys"


def test_a_line_that_changes_on_the_disk_is_noticed_when_it_is_read(tmp_path: Path):
    path = tmp_path / "log"
    log = RowLog(path)
    log.add([row_line(1)])
    log.flush()
    index, whole = log.index(), path.read_bytes()
    path.write_bytes(whole.replace(b'"text"', b'"texx"'))
    for read in (lambda: log.index(), lambda: list(log.read(index))):
        with pytest.raises(RowLogError, match="line 1 has changed on the disk"):
            read()
    os.truncate(path, 0)
    for read in (lambda: log.index(), lambda: list(log.read(index))):
        with pytest.raises(OSError, match="ends at byte 0; somebody has shortened it"):
            read()
    log.close()


def test_a_log_that_is_not_there_yet_begins_empty_and_another_runs_is_not_touched(tmp_path: Path):
    path = tmp_path / "log"
    assert recovered(path) == []
    with pytest.raises(FileExistsError):
        RowLog(path)
