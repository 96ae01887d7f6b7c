"""Events as the engine makes them, small enough to write down."""

from collections.abc import Iterable

import numpy as np

from nanovllm.engine.plan import Plan, StepResult
from nanovllm.events import BlockEvent, BlockEvents, FinishedSequence, Preemption, ScheduleEvent, StepEvent


def make_plan(
    step: int = 0,
    *,
    decodes: list[tuple[int, int]] | None = None,
    prefills: list[tuple[int, int, int]] | None = None,
) -> Plan:
    """`decodes` are (seq_id, context after the step), `prefills` (seq_id, start, tokens)."""
    decodes, prefills = decodes or [], prefills or []
    rows = [(seq_id, context - 1, 1) for seq_id, context in decodes] + prefills
    num_prefill_tokens = sum(count for _, _, count in prefills)
    nothing = np.empty(0, np.int32)
    return Plan(
        step=step,
        seq_ids=np.array([row[0] for row in rows], np.int64),
        slots=np.arange(len(rows), dtype=np.int32),
        starts=np.array([row[1] for row in rows], np.int32),
        num_tokens=np.array([row[2] for row in rows], np.int32),
        samples=np.ones(len(rows), np.bool_),
        num_decodes=len(decodes),
        prefill_token_ids=np.zeros(num_prefill_tokens, np.int32),
        admissions=(),
        table_slots=nothing,
        table_columns=nothing,
        table_blocks=nothing,
    )


def make_schedule(
    plan: Plan,
    *,
    start_ns: int = 0,
    cached: list[int] | None = None,
    preemptions: tuple[Preemption, ...] = (),
    block_events: Iterable[BlockEvent] = (),
    free_blocks: int = 507,
    used_blocks: int = 5,
) -> ScheduleEvent:
    return ScheduleEvent(
        plan=plan,
        start_ns=start_ns,
        num_waiting=3,
        num_running=plan.num_rows,
        cached_tokens=np.array(cached if cached is not None else [0] * plan.num_rows, np.int32),
        preemptions=preemptions,
        block_events=_columns(block_events),
        free_blocks=free_blocks,
        used_blocks=used_blocks,
    )


def make_step(
    schedule: ScheduleEvent,
    *,
    end_ns: int = 1_000_000,
    result: StepResult | None = None,
    sampled: list[bool] | None = None,
    finished: tuple[FinishedSequence, ...] = (),
    dropped: tuple[int, ...] = (),
    block_events: Iterable[BlockEvent] = (),
) -> StepEvent:
    plan = schedule.plan
    return StepEvent(
        schedule=schedule,
        result=result or StepResult(token_ids=np.zeros(plan.num_rows, np.int32), logits_rows=plan.num_rows),
        end_ns=end_ns,
        schedule_ms=0.25,
        postprocess_ms=0.125,
        sampled=plan.samples if sampled is None else np.array(sampled, np.bool_),
        finished=finished,
        dropped_seq_ids=dropped,
        block_events=_columns(block_events),
        free_blocks=schedule.free_blocks,
        used_blocks=schedule.used_blocks,
        cached_blocks=2,
    )


def _columns(events: Iterable[BlockEvent]) -> BlockEvents:
    return events if isinstance(events, BlockEvents) else BlockEvents.of(events)
