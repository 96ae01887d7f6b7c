"""The flight recorder's tables: the contract's columns, and what stands in them."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.record_schemas import SCHEMAS
from jobs.recorder import ParquetRecorder, read_records
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
    BlockEvent,
    BlockEvents,
    FinishedSequence,
    Preemption,
)
from tests.jobs.recorder_events import arrival, decode_step, parts, request
from tests.logging.synthetic_events import make_plan, make_schedule, make_step

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
