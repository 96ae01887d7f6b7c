"""Events to Arrow: whole columns at a time, because this runs beside the step loop and takes turns with it."""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter

import numpy as np
import numpy.ma  # like pyarrow.compute, loaded now: pyarrow would do it in the middle of a run
import pyarrow as pa
import pyarrow.compute

from jobs.record_schemas import BLOCK_EVENTS, REQUESTS, STEPS
from jobs.shared_prefix import SharedPrefix
from nanovllm.events import BLOCK_EVENT_ROW, EVENT_KINDS, EVENT_REASONS, BlockEvents, RequestEvent, StepEvent

_KINDS = pa.array(EVENT_KINDS, pa.string())
_REASONS = pa.array(EVENT_REASONS, pa.string())

Columns = dict[str, pa.Array | np.ndarray | Sequence[object]]


def encode_steps(events: Sequence[StepEvent], *, replica: int, attempt: int) -> pa.RecordBatch:
    """One row for each step, in the order given."""
    schedules = [event.schedule for event in events]
    plans = [schedule.plan for schedule in schedules]
    results = [event.result for event in events]
    sizes = [len(plan.seq_ids) for plan in plans]
    offsets = _offsets(sizes)
    num_tokens = _joined((plan.num_tokens for plan in plans), np.int32)
    contexts = _joined((plan.starts for plan in plans), np.int32) + num_tokens
    cached = _joined((schedule.cached_tokens for schedule in schedules), np.int32)
    prefill_tokens = np.array([len(plan.prefill_token_ids) for plan in plans], np.int64)
    columns: Columns = {
        "step": [plan.step for plan in plans],
        "phase": [plan.phase for plan in plans],
        "start_ns": [schedule.start_ns for schedule in schedules],
        "padded_batch_size": [
            result.padded_batch_size if result.cuda_graph else size for result, size in zip(results, sizes, strict=True)
        ],
        "padded_num_tokens": [
            result.padded_tokens if result.cuda_graph else plan_tokens
            for result, plan_tokens in zip(results, _sums(num_tokens, offsets).tolist(), strict=True)
        ],
        "batch_size": sizes,
        "num_prefill_tokens": prefill_tokens,
        "num_decode_tokens": _sums(num_tokens, offsets) - prefill_tokens,
        "num_cached_tokens": _sums(cached, offsets),
        "num_preempted": [len(schedule.preemptions) for schedule in schedules],
        "num_finished": [len(event.finished) for event in events],
        "seq_ids": _lists(offsets, _joined((plan.seq_ids for plan in plans), np.int64)),
        "seq_num_tokens": _lists(offsets, num_tokens),
        "seq_context_lens": _lists(offsets, contexts),
        "seq_cached_tokens": _lists(offsets, cached),
        "seq_sampled": _lists(offsets, _joined((event.sampled for event in events), np.bool_)),
        "preempted_seq_ids": _id_lists([[fact.seq_id for fact in schedule.preemptions] for schedule in schedules]),
        "finished_seq_ids": _id_lists([[fact.seq_id for fact in event.finished] for event in events]),
        "dropped_seq_ids": _id_lists([event.dropped_seq_ids for event in events]),
    }
    _add_attributes(columns, schedules, ("num_waiting", "num_running"))
    _add_attributes(columns, events, ("end_ns", "schedule_ms", "postprocess_ms"))
    _add_attributes(columns, events, ("free_blocks", "used_blocks", "cached_blocks"))
    _add_attributes(columns, results, ("prepare_ms", "forward_ms", "cuda_graph", "in_halves"))
    _add_attributes(columns, results, ("comm_calls", "comm_bytes", "device_allocated_bytes", "device_reserved_bytes"))
    return _batch(STEPS, columns, len(events), replica, attempt)


def encode_block_events(groups: Sequence[tuple[int, BlockEvents]], *, replica: int, attempt: int) -> pa.RecordBatch:
    """One row for each event; a group is a step's number and events of it, in the order in which they happened."""
    sizes = [len(events) for _, events in groups]
    # As bytes: numpy joins arrays of rows pair by pair, in Python.
    rows = np.concatenate([events.rows.view(np.uint8) for _, events in groups]).view(BLOCK_EVENT_ROW)
    columns: Columns = {
        "step": np.repeat(np.array([step for step, _ in groups], np.int64), sizes),
        "event": _KINDS.take(pa.array(rows["event"])),
        "reason": _REASONS.take(pa.array(rows["reason"])),
        "block_hash": _nullable(np.ascontiguousarray(rows["block_hash"]), rows["has_hash"]),
    }
    for name in ("block_id", "seq_id", "ref_count", "free_blocks"):
        columns[name] = np.ascontiguousarray(rows[name])
    return _batch(BLOCK_EVENTS, columns, len(rows), replica, attempt)


def encode_requests(
    requests: Sequence[tuple[RequestEvent, SharedPrefix]], *, replica: int, attempt: int
) -> pa.RecordBatch:
    """One row for each request that has ended, in the order given."""
    events = [event for event, _ in requests]
    columns: Columns = {
        "id": [event.request_id for event in events],
        "shared_prefix_row": [shared.row for _, shared in requests],
        "shared_prefix_tokens": [shared.num_tokens for _, shared in requests],
    }
    origin = ("replica", "attempt")
    _add_attributes(columns, events, [name for name in REQUESTS.names if name not in columns and name not in origin])
    return _batch(REQUESTS, columns, len(events), replica, attempt)


def _batch(schema: pa.Schema, columns: Columns, num_rows: int, replica: int, attempt: int) -> pa.RecordBatch:
    columns["replica"] = np.full(num_rows, replica, np.int32)
    columns["attempt"] = np.full(num_rows, attempt, np.int32)
    assert columns.keys() == set(schema.names), f"columns {columns.keys() ^ set(schema.names)} are not in both"
    return pa.RecordBatch.from_arrays([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _array(values: pa.Array | np.ndarray | Sequence[object], kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def _add_attributes(columns: Columns, objects: Sequence[object], names: Iterable[str]) -> None:
    for name in names:
        columns[name] = list(map(attrgetter(name), objects))


def _nullable(values: np.ndarray, is_there: np.ndarray) -> pa.Array:
    bitmap = np.packbits(is_there, bitorder="little")
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [pa.py_buffer(bitmap), pa.py_buffer(values)]
    )


def _offsets(sizes: Sequence[int]) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    parts = list(arrays)
    return np.concatenate(parts, dtype=dtype) if parts else np.empty(0, dtype)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each row's values; unlike np.add.reduceat also where a row has none."""
    totals = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=totals[1:])
    return totals[offsets[1:]] - totals[offsets[:-1]]


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(offsets, values)


def _id_lists(rows: Sequence[Sequence[int]]) -> pa.Array:
    ids = np.array(list(chain.from_iterable(rows)), np.int64)
    return _lists(_offsets([len(row) for row in rows]), ids)
