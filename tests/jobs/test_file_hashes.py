"""Hashes of the files that decide answers, and what tells two sets of files apart."""

import hashlib
import os
from pathlib import Path

import pytest

import jobs.file_hashes
from jobs.file_hashes import FileHashes, file_differences
from nanovllm.models.source import resolve_model


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n')
    return path


def fingerprint(rows: Path) -> dict:
    hashes = FileHashes(resolve_model("tiny"), [str(rows)])
    hashes.wait()
    return hashes.fingerprint()


def test_small_files_are_hashed_at_once_and_all_of_them_in_the_end(rows: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs.file_hashes, "SMALL_BYTES", 1000)
    hashes = FileHashes(resolve_model("tiny"), [str(rows)])
    at_once = hashes.fingerprint()
    assert at_once["input"][str(rows)]["sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    hashes.wait()
    assert hashes.has_news
    later = hashes.fingerprint()
    assert not hashes.has_news
    assert all(facts["sha256"] for facts in later["model"].values())
    assert file_differences(later, at_once) == []


def test_hashes_that_are_known_are_taken_over(rows: Path, monkeypatch: pytest.MonkeyPatch):
    known = fingerprint(rows)
    monkeypatch.setattr(FileHashes, "_hash", lambda self, path, stamp: pytest.fail("hashed again"))
    assert FileHashes(resolve_model("tiny"), [str(rows)], known=known).fingerprint() == known


def test_without_a_hash_the_time_of_modification_stands_for_it(rows: Path):
    before = fingerprint(rows)
    before["input"][str(rows)]["sha256"] = None
    assert file_differences(fingerprint(rows), before) == []
    os.utime(rows, ns=(1, 1))
    (difference,) = file_differences(fingerprint(rows), before)
    assert "was written to after the run began" in difference


def test_with_its_hash_a_file_may_be_touched_or_copied(rows: Path):
    before = fingerprint(rows)
    os.utime(rows, ns=(1, 1))
    assert file_differences(fingerprint(rows), before) == []


def test_what_is_appended_while_it_is_hashed_shows_in_the_size(rows: Path):
    hashes = FileHashes(resolve_model("tiny"), [str(rows)])
    hashes.wait()
    before = hashes.fingerprint()
    with open(rows, "ab") as file:
        file.write(b"{}\n")
    (difference,) = file_differences(fingerprint(rows), before)
    assert "has 19 bytes; in the run it had 16" in difference


def test_pipes_have_no_fingerprint(tmp_path: Path, rows: Path):
    os.mkfifo(tmp_path / "pipe")
    for inputs in (["-"], [str(tmp_path / "pipe")], [str(rows), "-"]):
        assert FileHashes(resolve_model("tiny"), inputs).fingerprint()["input"] is None
