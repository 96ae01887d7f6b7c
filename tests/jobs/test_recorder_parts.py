"""The flight recorder's parts: when they are written, under which names, and who may overwrite them."""

import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from jobs.recorder import ParquetRecorder, read_records
from tests.jobs.recorder_events import decode_step, parts


def test_parts_are_written_every_flush_interval_and_sort_in_the_order_of_writing(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=0.02)
    for step in range(60):
        schedule, done = decode_step(step)
        recorder.on_schedule(schedule)
        recorder.on_step(done)
        time.sleep(0.003)
    recorder.close()
    assert len(parts(tmp_path, "steps")) > 3
    assert read_records(tmp_path, "steps")["step"].to_pylist() == list(range(60))
    assert len({pq.read_schema(part).serialize().to_pybytes() for part in parts(tmp_path, "steps")}) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_parts_of_a_later_attempt_sort_behind_and_replicas_stand_side_by_side(tmp_path: Path):
    for attempt in range(2):
        for replica in range(2):
            recorder = ParquetRecorder.alone(tmp_path, replica=replica, attempt=attempt)
            schedule, done = decode_step(attempt)
            recorder.on_schedule(schedule)
            recorder.on_step(done)
            recorder.close()
    steps = read_records(tmp_path, "steps").select(["attempt", "replica", "step"]).to_pylist()
    assert [tuple(row.values()) for row in steps] == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]


def test_records_of_the_same_attempt_are_never_overwritten(tmp_path: Path):
    ParquetRecorder.alone(tmp_path).close()
    with pytest.raises(FileExistsError, match="replica 0, attempt 0"):
        ParquetRecorder.alone(tmp_path)


def test_a_new_attempt_removes_what_a_killed_one_left_unfinished(tmp_path: Path):
    ParquetRecorder.alone(tmp_path).close()
    unfinished = tmp_path / "records" / "steps" / "a0000-r0000-00000007.parquet.tmp"
    foreign = tmp_path / "records" / "steps" / "a0000-r0001-00000007.parquet.tmp"
    unfinished.write_bytes(b"PAR1")
    foreign.write_bytes(b"PAR1")
    ParquetRecorder.alone(tmp_path, attempt=1).close()
    assert not unfinished.exists()
    assert foreign.exists()


def test_duckdb_opens_a_table_by_its_glob(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path)
    for step in range(5):
        schedule, done = decode_step(step)
        recorder.on_schedule(schedule)
        recorder.on_step(done)
    recorder.close()
    glob = tmp_path / "records" / "steps" / "*.parquet"
    query = f"select count(*), sum(len(seq_ids)), max(list_sum(seq_num_tokens)) from '{glob}'"
    assert duckdb.connect().execute(query).fetchall() == [(5, 15, 3)]


def test_an_unknown_table_and_missing_records_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="table=blocks: must be one of"):
        read_records(tmp_path, "blocks")
    with pytest.raises(FileNotFoundError, match="records/steps"):
        read_records(tmp_path, "steps")
