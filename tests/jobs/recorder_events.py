"""Events for a recorder, and where they end up."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from nanovllm.events import (
    ALLOCATE,
    COMMIT,
    ArrivalEvent,
    BlockEvent,
    RequestEvent,
    ScheduleEvent,
    StepEvent,
)
from tests.logging.synthetic_events import make_plan, make_schedule, make_step


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
