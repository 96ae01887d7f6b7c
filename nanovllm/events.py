"""What the outside learns of a run: typed facts, published by LLMEngine, read by recorders."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from nanovllm.engine.plan import Plan, StepResult

ALLOCATE, HIT, COMMIT, FREE, RELEASE, EVICT = "allocate", "hit", "commit", "free", "release", "evict"
FINISHED, PREEMPTED, ABORTED = "finished", "preempted", "aborted"

EVENT_KINDS = (ALLOCATE, HIT, COMMIT, FREE, RELEASE, EVICT)
EVENT_REASONS = (None, FINISHED, PREEMPTED, ABORTED)


class BlockEvent(NamedTuple):
    """One thing that happened to one KV block; the columns of the block_events table."""

    event: str
    """allocate, hit, commit, free, release or evict"""
    block_id: int
    seq_id: int
    reason: str | None
    """finished, preempted or aborted for free and release, else None"""
    ref_count: int
    """After the event."""
    block_hash: int | None
    """uint64 of the whole prefix up to and including the block; None where it holds no reusable prefix."""
    free_blocks: int
    """After the event, blocks with a reusable prefix included."""


BLOCK_EVENT_ROW = np.dtype(
    [
        ("event", np.int8),  # place in EVENT_KINDS
        ("reason", np.int8),  # place in EVENT_REASONS
        ("has_hash", np.bool_),  # where not, block_hash means nothing
        ("block_id", np.int32),
        ("ref_count", np.int32),
        ("free_blocks", np.int32),
        ("seq_id", np.int64),
        ("block_hash", np.uint64),
    ],
    align=True,
)


class BlockEvents(Sequence[BlockEvent]):
    """Block events in the order in which they happened.

    A step of a long prompt has tens of thousands, so they are kept as rows of one array; a BlockEvent is made of a
    row only when one is asked for.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        """BLOCK_EVENT_ROW [events]; nobody changes it."""

    @classmethod
    def of(cls, events: Iterable[BlockEvent]) -> "BlockEvents":
        rows = [
            (
                EVENT_KINDS.index(event.event),
                EVENT_REASONS.index(event.reason),
                event.block_hash is not None,
                event.block_id,
                event.ref_count,
                event.free_blocks,
                event.seq_id,
                event.block_hash or 0,
            )
            for event in events
        ]
        return cls(np.array(rows, BLOCK_EVENT_ROW))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[BlockEvent]:
        for event, reason, has_hash, block_id, ref_count, free_blocks, seq_id, block_hash in self.rows.tolist():
            yield BlockEvent(
                EVENT_KINDS[event],
                block_id,
                seq_id,
                EVENT_REASONS[reason],
                ref_count,
                block_hash if has_hash else None,
                free_blocks,
            )

    @overload
    def __getitem__(self, index: int) -> BlockEvent: ...
    @overload
    def __getitem__(self, index: slice) -> "BlockEvents": ...
    def __getitem__(self, index: int | slice) -> "BlockEvent | BlockEvents":
        if isinstance(index, slice):
            return BlockEvents(self.rows[index])
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockEvents) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BlockEvents({list(self)!r})"


class Preemption(NamedTuple):
    seq_id: int
    freed_blocks: int
    free_blocks: int
    num_preemptions: int
    """Of this sequence, this one included."""


class FinishedSequence(NamedTuple):
    seq_id: int
    num_output_tokens: int
    reason: str
    """eos, stop, max_tokens, abort or error"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleEvent:
    """A step has been scheduled and is about to be launched."""

    plan: Plan
    start_ns: int
    num_waiting: int
    num_running: int
    cached_tokens: np.ndarray
    """int32 [rows]; tokens that the row takes from the prefix cache in this step."""
    preemptions: tuple[Preemption, ...]
    block_events: BlockEvents
    """In the order in which they happened."""
    free_blocks: int
    """After scheduling, as are used_blocks."""
    used_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """A step's result has been committed. With look-ahead, the next step was scheduled before this."""

    schedule: ScheduleEvent
    result: StepResult
    end_ns: int
    schedule_ms: float
    postprocess_ms: float
    sampled: np.ndarray
    """bool [rows]; whether a token was sampled (a row whose logits were not finite samples none)."""
    finished: tuple[FinishedSequence, ...]
    dropped_seq_ids: tuple[int, ...]
    """Sequences that had already ended when this step's token of theirs arrived."""
    block_events: BlockEvents
    """Of the commit alone; those of the scheduling are in `schedule`."""
    free_blocks: int
    used_blocks: int
    cached_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalEvent:
    """A sequence has been handed to the engine."""

    seq_id: int
    row: int
    sample: int
    time_ns: int
    prompt_token_ids: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """A sequence has ended; times are None where it never got so far."""

    seq_id: int
    row: int
    sample: int
    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache when the sequence first ran."""
    num_output_tokens: int
    arrived_ns: int
    first_scheduled_ns: int | None
    first_token_ns: int | None
    finished_ns: int
    num_preemptions: int
    finish_reason: str
    """stop, length, error or aborted"""


class Recorder:
    """Learns of a run as it happens. This base class ignores everything; override what you need.

    Calls come from the step loop, one at a time, in the order in which things happened. What takes long belongs in a
    thread of the recorder's own.
    """

    def on_start(self, num_prompts: int | None, num_prompt_tokens: int | None, source: str | None) -> None:
        """Generation begins; the numbers are None, and `source` is set, when prompts are streamed."""

    def on_arrival(self, event: ArrivalEvent) -> None: ...

    def on_schedule(self, event: ScheduleEvent) -> None: ...

    def on_step(self, event: StepEvent) -> None: ...

    def on_request(self, event: RequestEvent) -> None: ...

    def on_abort(self, step: int, block_events: BlockEvents) -> None:
        """Sequences were given up between steps; these are their blocks, given back after `step` was committed."""

    def on_end(self) -> None:
        """Generation is complete; a recorder may be started again."""

    def close(self) -> None:
        """No more events; everything is on disk when this returns."""
