"""Block events of a simulation."""

import numpy as np

from nanovllm.events import BLOCK_EVENT_ROW, BlockEvents, Recorder, ScheduleEvent, StepEvent

COMPARED = ("step", "event", "block_id", "seq_id", "reason", "ref_count", "free_blocks")
"""All but the hash: the tokens of a simulated prompt are made up."""

Columns = dict[str, np.ndarray]


class BlockLedger(Recorder):
    """Keeps the block events of a simulation."""

    def __init__(self) -> None:
        self._parts: list[tuple[int | np.ndarray, BlockEvents]] = []

    def on_schedule(self, event: ScheduleEvent) -> None:
        self._parts.append((event.plan.step, event.block_events))

    def on_step(self, event: StepEvent) -> None:
        self._parts.append((event.schedule.plan.step, event.block_events))

    def on_leap(self, steps: np.ndarray, events: BlockEvents) -> None:
        """Of steps that were taken at once; `steps` has that of each event."""
        self._parts.append((steps, events))

    def columns(self) -> Columns:
        """COMPARED, events and reasons as their places in EVENT_KINDS and EVENT_REASONS."""
        rows = np.concatenate([np.empty(0, BLOCK_EVENT_ROW), *(events.rows for _, events in self._parts)])
        steps = (np.broadcast_to(step, len(events)) for step, events in self._parts)
        step = np.concatenate([np.empty(0, np.int64), *steps])
        return {"step": step, **{name: rows[name] for name in COMPARED if name != "step"}}
