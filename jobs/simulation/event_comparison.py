"""Block events of a simulation beside the recorded ones."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.simulation.block_ledger import COMPARED, Columns
from nanovllm.events import EVENT_KINDS, EVENT_REASONS


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
