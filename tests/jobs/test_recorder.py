"""The flight recorder beside the step loop: what it promises when writing is slow, fails or is killed."""

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

import jobs.journal
from jobs import disk
from jobs.record_parts import PartWriter
from jobs.record_schemas import TABLES
from jobs.recorder import JournalError, ParquetRecorder, read_records
from tests.jobs.recorder_events import decode_step, parts, request

ROOT = Path(__file__).parents[2]

# The writer's thread


@pytest.mark.parametrize("flush_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_flush_interval_that_is_no_positive_number_is_refused(flush_s: float, tmp_path: Path):
    with pytest.raises(ValueError, match=r"recorder\.flush_s"):
        ParquetRecorder.alone(tmp_path, flush_s=flush_s)


def feed_until_error(recorder: ParquetRecorder) -> None:
    for step in range(10_000):
        schedule, done = decode_step(step)
        recorder.on_schedule(schedule)
        recorder.on_step(done)
        time.sleep(0.001)


def test_an_error_while_writing_stops_the_step_loop_and_is_raised_by_close_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=0.01)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "sync", full)
    with pytest.raises(JournalError, match="No space left on device") as caught:
        feed_until_error(recorder)
    assert isinstance(caught.value.__cause__, OSError)
    for _ in range(2):
        with pytest.raises(JournalError, match="No space left on device"):
            recorder.close()


def test_a_directory_that_disappears_is_an_error(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=0.01)
    for table in TABLES:
        for part in parts(tmp_path, table):
            part.unlink()
        (tmp_path / "records" / table).rmdir()
    with pytest.raises(JournalError):
        feed_until_error(recorder)
    with pytest.raises(JournalError):
        recorder.close()


def test_events_that_do_not_fit_their_column_are_an_error(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path)
    recorder.on_request(request(0, num_output_tokens=2**40))
    with pytest.raises(JournalError):
        recorder.close()


def test_when_the_writer_falls_behind_the_step_loop_waits_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=0.01, max_pending=300)
    go_on, write = threading.Event(), PartWriter.write

    def slow_write(self: PartWriter, batches: list[pa.RecordBatch]) -> None:
        go_on.wait()
        write(self, batches)

    monkeypatch.setattr(PartWriter, "write", slow_write)
    num_recorded = 0

    def step_loop() -> None:
        nonlocal num_recorded
        for step in range(200):
            schedule, done = decode_step(step)
            recorder.on_schedule(schedule)
            recorder.on_step(done)
            num_recorded += 1

    loop = threading.Thread(target=step_loop)
    loop.start()
    time.sleep(0.2)
    before = num_recorded
    time.sleep(0.1)
    assert before == num_recorded < 100, "the step loop did not wait"
    go_on.set()
    loop.join(timeout=20)
    recorder.close()
    assert read_records(tmp_path, "steps")["step"].to_pylist() == list(range(200))
    assert read_records(tmp_path, "block_events").num_rows == 400


def test_an_error_frees_a_step_loop_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=0.01, max_pending=100)

    def fail(self: PartWriter, batches: list[pa.RecordBatch]) -> None:
        time.sleep(0.1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(PartWriter, "write", fail)
    with pytest.raises(JournalError, match="Input/output error"):
        feed_until_error(recorder)
    with pytest.raises(JournalError):
        recorder.close()


def test_close_writes_the_rest_at_once_and_a_second_close_does_nothing(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=1000.0)
    schedule, done = decode_step(0)
    recorder.on_schedule(schedule)
    recorder.on_step(done)
    recorder.on_end()
    start = time.monotonic()
    recorder.close()
    recorder.close()
    assert time.monotonic() - start < 10
    assert read_records(tmp_path, "steps").num_rows == 1
    with pytest.raises(ValueError, match="closed"):
        recorder.on_step(done)


def test_memory_stays_flat_while_a_part_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What has come is written before the interval is over when there is much of it."""
    monkeypatch.setattr(jobs.journal, "MAX_UNWRITTEN_BYTES", 2**20)
    recorder = ParquetRecorder.alone(tmp_path, flush_s=1000.0)
    for step in range(2000):
        schedule, done = decode_step(step, num_rows=256, block_events=0)
        recorder.on_schedule(schedule)
        recorder.on_step(done)
    recorder.close()
    assert len(parts(tmp_path, "steps")) > 3
    assert read_records(tmp_path, "steps").num_rows == 2000


# Killed


FLUSH_S = 0.1
SLACK_S = 1.0
"""Time that encoding, writing, syncing and a busy machine may add to the flush interval."""

VICTIM = f"""
import sys, time
from pathlib import Path
from jobs.recorder import ParquetRecorder
from tests.jobs.recorder_events import decode_step, request
recorder = ParquetRecorder.alone(Path(sys.argv[1]), flush_s={FLUSH_S})
print("ready", flush=True)
step = 0
while True:
    schedule, done = decode_step(step, num_rows=64, block_events=4)
    recorder.on_schedule(schedule)
    recorder.on_step(done)
    recorder.on_request(request(step))
    print(step, time.monotonic(), flush=True)
    step += 1
    time.sleep(0.002)
"""


def kill_at_random(run: Path, rng: random.Random) -> tuple[int, int]:
    """Runs a recorder and kills it; returns the last step it recorded, and the last that must be on disk."""
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(run)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert victim.stdout is not None
    with victim, victim.stdout:
        assert victim.stdout.readline() == "ready\n"
        killer = threading.Timer(FLUSH_S + SLACK_S + rng.uniform(0.0, 0.5), victim.kill)
        killer.start()
        lines = [line.split() for line in victim.stdout if line.endswith("\n")]
        killer.join()
    recorded = [(int(step), float(at)) for step, at in lines]
    last_s = recorded[-1][1]
    return recorded[-1][0], max(step for step, at in recorded if at <= last_s - FLUSH_S - SLACK_S)


def test_after_sigkill_every_table_opens_and_only_the_last_interval_is_missing(tmp_path: Path):
    runs = [tmp_path / str(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        killed = list(pool.map(kill_at_random, runs, map(random.Random, range(6))))
    for run, (recorded, safe) in zip(runs, killed, strict=True):
        steps = read_records(run, "steps")["step"].to_pylist()
        assert steps == list(range(len(steps)))
        assert safe <= steps[-1] <= recorded + 1
        blocks = read_records(run, "block_events")["step"].to_pylist()
        assert blocks[-1] >= steps[-1], "a step is on disk before its block events"
        requests = read_records(run, "requests")["seq_id"].to_pylist()
        assert requests == list(range(len(requests)))
        assert len(requests) <= len(steps), "a request is on disk before its step"
