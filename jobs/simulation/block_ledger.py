"""Block events of a simulation beside the recorded ones."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanovllm.events import BLOCK_EVENT_ROW, EVENT_KINDS, EVENT_REASONS, BlockEvents, Recorder, ScheduleEvent, StepEvent

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


def recorded_columns(table: pa.Table) -> Columns:
    """As BlockLedger.columns, of a run's block_events."""
    codes = {
        "event": pc.call_function("index_in", [table["event"]], pc.SetLookupOptions(pa.array(EVENT_KINDS))),
        "reason": pc.call_function("index_in", [table["reason"]], pc.SetLookupOptions(pa.array(EVENT_REASONS))),
    }
    return {name: (codes[name] if name in codes else table[name]).to_numpy() for name in COMPARED}


def first_difference(recorded: Columns, simulated: Columns) -> str | None:
    """The first event that is not the same, in words; None where all are."""
    num_recorded, num_simulated = len(recorded["step"]), len(simulated["step"])
    both = min(num_recorded, num_simulated)
    differs = np.zeros(both, np.bool_)
    for name in COMPARED:
        differs |= recorded[name][:both] != simulated[name][:both]
    place = int(differs.argmax()) if differs.any() else both
    if place == both and num_recorded == num_simulated:
        return None
    return f"event {place:,}: recorded {_words(recorded, place)}, simulated {_words(simulated, place)}"


def _words(columns: Columns, place: int) -> str:
    if place >= len(columns["step"]):
        return "nothing more"
    values = {name: columns[name][place].item() for name in COMPARED}
    values["event"], values["reason"] = EVENT_KINDS[values["event"]], EVENT_REASONS[values["reason"]]
    return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
