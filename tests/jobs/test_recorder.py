"""The flight recorder: its columns, its order, and what it promises when writing is slow, fails or is killed.

python -m tests.jobs.test_recorder          measures what a step costs the step loop
"""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.journal
from jobs import disk
from jobs.record_parts import PartWriter
from jobs.record_schemas import SCHEMAS
from jobs.recorder import JournalError, ParquetRecorder, read_records
from nanovllm.engine.plan import StepResult
from nanovllm.events import (
    ABORTED,
    ALLOCATE,
    COMMIT,
    EVICT,
    FINISHED,
    FREE,
    HIT,
    PREEMPTED,
    RELEASE,
    ArrivalEvent,
    BlockEvent,
    BlockEvents,
    FinishedSequence,
    Preemption,
    RequestEvent,
    ScheduleEvent,
    StepEvent,
)
from tests.logging.synthetic_events import make_plan, make_schedule, make_step

ROOT = Path(__file__).parents[2]

# The tables of the contract, word for word.
CONTRACT = {
    "steps": """
        replica int32, attempt int32, step int64, phase string, start_ns int64, end_ns int64, schedule_ms double,
        prepare_ms double, postprocess_ms double, forward_ms double, batch_size int32, padded_batch_size int32,
        padded_num_tokens int32,
        num_prefill_tokens int32, num_decode_tokens int32, num_cached_tokens int32, num_waiting int32,
        num_running int32, num_preempted int32, num_finished int32, free_blocks int32, used_blocks int32,
        cached_blocks int32, cuda_graph bool, in_halves bool, device_allocated_bytes int64, device_reserved_bytes int64,
        seq_ids list<int64>, seq_num_tokens list<int32>, seq_context_lens list<int32>, seq_cached_tokens list<int32>,
        seq_sampled list<bool>, preempted_seq_ids list<int64>, finished_seq_ids list<int64>,
        dropped_seq_ids list<int64>, comm_calls int32, comm_bytes int64""",
    "block_events": """
        replica int32, attempt int32, step int64, event string, block_id int32, seq_id int64, reason string,
        ref_count int32, block_hash uint64, free_blocks int32""",
    "requests": """
        replica int32, attempt int32, seq_id int64, row int64, sample int32, id string, num_prompt_tokens int32,
        num_cached_tokens int32, num_output_tokens int32, arrived_ns int64, first_scheduled_ns int64,
        first_token_ns int64, finished_ns int64, num_preemptions int32, finish_reason string, shared_prefix_row int64,
        shared_prefix_tokens int32""",
}


def contract_columns(table: str) -> list[tuple[str, str]]:
    return [tuple(column.split()) for column in CONTRACT[table].split(",")]


def columns_of(schema: pa.Schema) -> list[tuple[str, str]]:
    return [
        (field.name, f"list<{field.type.value_type}>" if pa.types.is_list(field.type) else str(field.type))
        for field in schema
    ]


def parts(run: Path, table: str) -> list[Path]:
    return sorted((run / "records" / table).glob("*.parquet"))


def decode_step(step: int, num_rows: int = 3, block_events: int = 2) -> tuple[ScheduleEvent, StepEvent]:
    """A decode step with half of its block events from the scheduling and half from the commit."""
    taken = tuple(BlockEvent(ALLOCATE, i, i, None, 1, None, 500 - i) for i in range(block_events // 2))
    published = tuple(BlockEvent(COMMIT, i, i, None, 1, 2**64 - 1 - i, 500) for i in range(block_events // 2))
    plan = make_plan(step, decodes=[(seq_id, 10 + step) for seq_id in range(num_rows)])
    schedule = make_schedule(plan, start_ns=1000 * step, block_events=taken)
    return schedule, make_step(schedule, end_ns=1000 * step + 900, block_events=published)


def request(seq_id: int, **changes: object) -> RequestEvent:
    event = RequestEvent(
        seq_id=seq_id,
        row=seq_id,
        sample=0,
        request_id=f"id-{seq_id}",
        num_prompt_tokens=3,
        num_cached_tokens=0,
        num_output_tokens=2,
        arrived_ns=1,
        first_scheduled_ns=2,
        first_token_ns=3,
        finished_ns=4,
        num_preemptions=0,
        finish_reason="stop",
    )
    return replace(event, **changes)


def arrival(seq_id: int, row: int, *token_ids: int, sample: int = 0) -> ArrivalEvent:
    return ArrivalEvent(
        seq_id=seq_id, row=row, sample=sample, time_ns=0, prompt_token_ids=np.array(token_ids, np.int32)
    )


# Tables


@pytest.mark.parametrize("table", CONTRACT)
def test_each_table_has_exactly_the_columns_of_the_contract(table: str, tmp_path: Path):
    ParquetRecorder.alone(tmp_path).close()
    (part,) = parts(tmp_path, table)
    schema = pq.read_schema(part)
    assert columns_of(schema) == contract_columns(table)
    assert schema.metadata[b"schema_version"] == b"3"
    assert schema == SCHEMAS[table]


def test_the_tables_open_from_the_first_instant_on(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path, flush_s=1000.0)
    for table in CONTRACT:
        assert read_records(tmp_path, table).num_rows == 0
    recorder.close()


def test_a_step_comes_back_as_it_happened(tmp_path: Path):
    plan = make_plan(41, decodes=[(7, 80), (9, 33)], prefills=[(11, 32, 46), (12, 0, 5)])
    schedule = make_schedule(
        plan, start_ns=10, cached=[0, 0, 32, 0], preemptions=(Preemption(13, 4, 9, 1), Preemption(14, 1, 10, 3))
    )
    result = StepResult(
        token_ids=np.array([1, 2, -1], np.int32),
        prepare_ms=0.5,
        forward_ms=7.25,
        padded_batch_size=8,
        padded_tokens=64,
        cuda_graph=True,
        logits_rows=4,
        device_allocated_bytes=5_000_000_000,
        device_reserved_bytes=6_000_000_000,
        comm_calls=56,
        comm_bytes=3_000_000_000,
    )
    step = make_step(
        schedule,
        end_ns=20,
        result=result,
        sampled=[True, True, False, False],
        finished=(FinishedSequence(7, 4, "eos"),),
        dropped=(9,),
    )
    recorder = ParquetRecorder.alone(tmp_path, replica=2, attempt=1)
    recorder.on_schedule(schedule)
    recorder.on_step(step)
    recorder.close()
    assert read_records(tmp_path, "steps").to_pylist() == [
        {
            "replica": 2,
            "attempt": 1,
            "step": 41,
            "phase": "mixed",
            "start_ns": 10,
            "end_ns": 20,
            "schedule_ms": 0.25,
            "prepare_ms": 0.5,
            "postprocess_ms": 0.125,
            "forward_ms": 7.25,
            "batch_size": 4,
            "padded_batch_size": 8,
            "padded_num_tokens": 64,
            "num_prefill_tokens": 51,
            "num_decode_tokens": 2,
            "num_cached_tokens": 32,
            "num_waiting": 3,
            "num_running": 4,
            "num_preempted": 2,
            "num_finished": 1,
            "free_blocks": 507,
            "used_blocks": 5,
            "cached_blocks": 2,
            "cuda_graph": True,
            "in_halves": False,
            "device_allocated_bytes": 5_000_000_000,
            "device_reserved_bytes": 6_000_000_000,
            "seq_ids": [7, 9, 11, 12],
            "seq_num_tokens": [1, 1, 46, 5],
            "seq_context_lens": [80, 33, 78, 5],
            "seq_cached_tokens": [0, 0, 32, 0],
            "seq_sampled": [True, True, False, False],
            "preempted_seq_ids": [13, 14],
            "finished_seq_ids": [7],
            "dropped_seq_ids": [9],
            "comm_calls": 56,
            "comm_bytes": 3_000_000_000,
        }
    ]


def test_steps_that_ran_in_halves_say_so(tmp_path: Path):
    recorder, halved = ParquetRecorder.alone(tmp_path), [False, True, True, False]
    for step, in_halves in enumerate(halved):
        plan = make_plan(step, decodes=[(7, 80 + step), (9, 33 + step)])
        schedule = make_schedule(plan)
        result = StepResult(token_ids=np.array([1, 2], np.int32), cuda_graph=True, in_halves=in_halves)
        recorder.on_schedule(schedule)
        recorder.on_step(make_step(schedule, result=result))
    recorder.close()
    assert read_records(tmp_path, "steps")["in_halves"].to_pylist() == halved


def test_without_a_cuda_graph_the_padded_sizes_are_the_batchs(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path)
    schedule, step = decode_step(0, num_rows=3)
    recorder.on_schedule(schedule)
    recorder.on_step(step)
    recorder.close()
    assert read_records(tmp_path, "steps").select(["padded_batch_size", "padded_num_tokens"]).to_pylist() == [
        {"padded_batch_size": 3, "padded_num_tokens": 3}
    ]


def test_block_events_come_back_with_their_nulls_and_the_step_they_belong_to(tmp_path: Path):
    events = (
        BlockEvent(EVICT, 3, 8, None, 0, 2**64 - 1, 10),
        BlockEvent(ALLOCATE, 3, 8, None, 1, None, 9),
        BlockEvent(HIT, 4, 8, None, 2, 77, 9),
        BlockEvent(RELEASE, 4, 8, PREEMPTED, 1, 77, 9),
        BlockEvent(FREE, 3, 8, FINISHED, 0, None, 10),
    )
    schedule = make_schedule(make_plan(6, decodes=[(8, 5)]), block_events=events)
    recorder = ParquetRecorder.alone(tmp_path)
    recorder.on_schedule(schedule)
    recorder.on_step(make_step(schedule))
    recorder.on_abort(6, BlockEvents.of([BlockEvent(FREE, 4, 2, ABORTED, 0, 77, 11)]))
    recorder.close()
    rows = read_records(tmp_path, "block_events").to_pylist()
    origin = {"replica": 0, "attempt": 0, "step": 6}
    assert rows == [origin | event._asdict() for event in (*events, BlockEvent(FREE, 4, 2, ABORTED, 0, 77, 11))]


def test_requests_come_back_with_the_row_that_shares_their_longest_prefix(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path)
    recorder.on_arrival(arrival(0, 10, 1, 2, 3, 4))
    recorder.on_arrival(arrival(1, 11, 1, 2, 9))
    recorder.on_arrival(arrival(2, 12, 1, 2, 3, 7))
    recorder.on_arrival(arrival(3, 12, 1, 2, 3, 7, sample=1))
    recorder.on_request(request(3, row=12, sample=1))
    recorder.on_request(request(0, row=10, first_scheduled_ns=None, first_token_ns=None, finish_reason="aborted"))
    recorder.on_request(request(2, row=12, num_preemptions=2, num_cached_tokens=1))
    recorder.on_request(request(1, row=11, request_id="ä\x00"))
    recorder.close()
    rows = read_records(tmp_path, "requests").to_pylist()
    shared = {row["seq_id"]: (row["shared_prefix_row"], row["shared_prefix_tokens"]) for row in rows}
    assert shared == {0: (None, 0), 1: (10, 2), 2: (10, 3), 3: (10, 3)}
    assert [row["seq_id"] for row in rows] == [3, 0, 2, 1]
    assert rows[1]["first_token_ns"] is None
    assert rows[1]["first_scheduled_ns"] is None
    assert rows[3]["id"] == "ä\x00"
    assert rows[2]["num_preemptions"] == 2


def test_rows_stand_in_the_order_in_which_things_happened_also_with_look_ahead(tmp_path: Path):
    """Step n+1 is scheduled before step n is committed, and its block events come first."""
    recorder = ParquetRecorder.alone(tmp_path)
    steps = [decode_step(step) for step in range(300)]
    recorder.on_schedule(steps[0][0])
    for (_, done), (ahead, _) in itertools.pairwise(steps):
        recorder.on_schedule(ahead)
        recorder.on_step(done)
    recorder.on_step(steps[-1][1])
    recorder.close()
    happened = [(0, ALLOCATE)]
    for step in range(299):
        happened += [(step + 1, ALLOCATE), (step, COMMIT)]
    happened.append((299, COMMIT))
    blocks = read_records(tmp_path, "block_events")
    assert list(zip(blocks["step"].to_pylist(), blocks["event"].to_pylist(), strict=True)) == happened
    assert read_records(tmp_path, "steps")["step"].to_pylist() == list(range(300))


def test_steps_of_any_size_keep_their_own_sequences(tmp_path: Path):
    recorder = ParquetRecorder.alone(tmp_path)
    sizes = [3, 1, 0, 256, 0, 2]
    for step, size in enumerate(sizes):
        schedule, done = decode_step(step, num_rows=size)
        recorder.on_schedule(schedule)
        recorder.on_step(done)
    recorder.close()
    steps = read_records(tmp_path, "steps")
    assert steps["seq_ids"].to_pylist() == [list(range(size)) for size in sizes]
    assert steps["seq_context_lens"].to_pylist() == [[10 + step] * size for step, size in enumerate(sizes)]
    assert steps["num_decode_tokens"].to_pylist() == sizes


# Parts


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
    for table in CONTRACT:
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
from tests.jobs.test_recorder import decode_step, request
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


# Cost


def measure_cost(*, num_steps: int = 2000, num_rows: int = 256, block_events: int = 16, rounds: int = 10) -> dict:
    """Microseconds of the step loop that the recording of a step takes.

    calls_us: in on_schedule and on_step. encode_us: CPU time of the encoding in the writer's thread, for which the
    step loop may have to wait because both need the interpreter. Writing the parts runs without the interpreter and
    is write_us of the other core. Each is the least of `rounds`: other programs can only add to it.
    """
    steps = [decode_step(step, num_rows=num_rows, block_events=block_events) for step in range(num_steps)]
    measured = [_measure_round(steps) for _ in range(rounds)]
    least = [round(min(column), 1) for column in zip(*measured, strict=True)]
    sizes = {"rows": num_rows, "block_events": block_events}
    return sizes | dict(zip(("calls_us", "encode_us", "write_us"), least, strict=True))


def _measure_round(steps: list[tuple[ScheduleEvent, StepEvent]]) -> tuple[float, ...]:
    """Microseconds a step of the calls, the encoding and the writing."""
    calls_ns = 0
    with tempfile.TemporaryDirectory() as run:
        recorder = ParquetRecorder.alone(Path(run))
        tables = recorder.tables
        add, encode, write = Stopwatch(tables.add), Stopwatch(tables.encode), Stopwatch(tables.write)
        tables.add, tables.encode, tables.write = add, encode, write
        for schedule, done in steps:
            start_ns = time.perf_counter_ns()
            recorder.on_schedule(schedule)
            recorder.on_step(done)
            calls_ns += time.perf_counter_ns() - start_ns
            sum(range(5000))  # the engine's own work
        recorder.close()
    totals_ns = (calls_ns, add.total_ns + encode.total_ns, write.total_ns)
    return tuple(total_ns / len(steps) / 1e3 for total_ns in totals_ns)


class Stopwatch:
    """Adds up the CPU time of a function in the thread that calls it."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self.total_ns = 0

    def __call__(self, *arguments: object) -> None:
        start_ns = time.thread_time_ns()
        self._function(*arguments)
        self.total_ns += time.thread_time_ns() - start_ns


def test_the_cost_can_be_measured():
    cost = measure_cost(num_steps=50, rounds=1)
    assert min(cost["calls_us"], cost["encode_us"], cost["write_us"]) > 0


if __name__ == "__main__":
    print(json.dumps(measure_cost()))
