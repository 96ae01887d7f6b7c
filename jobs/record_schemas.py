"""The flight recorder's three tables: names, columns, types, and the version that a change of meaning raises."""

import pyarrow as pa

SCHEMA_VERSION = "3"
"""Stands under `schema_version` in each file's metadata. 2 added steps.padded_num_tokens, 3 steps.in_halves."""

# In the order in which their parts are written: what a request refers to is on disk before the request is.
TABLES = ("block_events", "steps", "requests")

_ORIGIN = [("replica", pa.int32()), ("attempt", pa.int32())]


def _table(columns: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(_ORIGIN + columns, metadata={"schema_version": SCHEMA_VERSION})


STEPS = _table(
    [
        ("step", pa.int64()),
        ("phase", pa.string()),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("schedule_ms", pa.float64()),
        ("prepare_ms", pa.float64()),
        ("postprocess_ms", pa.float64()),
        ("forward_ms", pa.float64()),
        ("batch_size", pa.int32()),
        ("padded_batch_size", pa.int32()),
        ("padded_num_tokens", pa.int32()),
        ("num_prefill_tokens", pa.int32()),
        ("num_decode_tokens", pa.int32()),
        ("num_cached_tokens", pa.int32()),
        ("num_waiting", pa.int32()),
        ("num_running", pa.int32()),
        ("num_preempted", pa.int32()),
        ("num_finished", pa.int32()),
        ("free_blocks", pa.int32()),
        ("used_blocks", pa.int32()),
        ("cached_blocks", pa.int32()),
        ("cuda_graph", pa.bool_()),
        ("in_halves", pa.bool_()),
        ("device_allocated_bytes", pa.int64()),
        ("device_reserved_bytes", pa.int64()),
        ("seq_ids", pa.list_(pa.int64())),
        ("seq_num_tokens", pa.list_(pa.int32())),
        ("seq_context_lens", pa.list_(pa.int32())),
        ("seq_cached_tokens", pa.list_(pa.int32())),
        ("seq_sampled", pa.list_(pa.bool_())),
        ("preempted_seq_ids", pa.list_(pa.int64())),
        ("finished_seq_ids", pa.list_(pa.int64())),
        ("dropped_seq_ids", pa.list_(pa.int64())),
        ("comm_calls", pa.int32()),
        ("comm_bytes", pa.int64()),
    ]
)

BLOCK_EVENTS = _table(
    [
        ("step", pa.int64()),
        ("event", pa.string()),
        ("block_id", pa.int32()),
        ("seq_id", pa.int64()),
        ("reason", pa.string()),
        ("ref_count", pa.int32()),
        ("block_hash", pa.uint64()),
        ("free_blocks", pa.int32()),
    ]
)

REQUESTS = _table(
    [
        ("seq_id", pa.int64()),
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("id", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_cached_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("arrived_ns", pa.int64()),
        ("first_scheduled_ns", pa.int64()),
        ("first_token_ns", pa.int64()),
        ("finished_ns", pa.int64()),
        ("num_preemptions", pa.int32()),
        ("finish_reason", pa.string()),
        ("shared_prefix_row", pa.int64()),
        ("shared_prefix_tokens", pa.int32()),
    ]
)

SCHEMAS = {"steps": STEPS, "block_events": BLOCK_EVENTS, "requests": REQUESTS}
