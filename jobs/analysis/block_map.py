"""Which blocks were in use or cached at which time, small enough to draw."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jobs.analysis.ledger import KIND, Ledger
from jobs.analysis.segments import Segment
from nanovllm.events import COMMIT, EVICT

MOST_BLOCKS = 4096
"""Blocks that are looked at; of a larger cache every 2nd, 3rd, ..."""
MOST_LINES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMap:
    """Lines of blocks against columns of time."""

    used: np.ndarray
    """uint8 [lines, columns]: share of the line's blocks that were in use at the column's end, 0 to 100."""
    cached: np.ndarray
    """The same, of those without a user that held a reusable prefix."""
    first_block: np.ndarray
    """[lines] The line's first block id; its blocks follow at `stride` up to the next line's."""
    stride: int


def event_times(segment: Segment) -> np.ndarray:
    """[events] Nanoseconds: the start of the step that scheduled it, or the end of the step that ended its sequence.

    An event of a step that a killed attempt did not record has the time of the last step that it did.
    """
    events, step = segment.events, segment.column("step")
    place = np.clip(np.searchsorted(step, events.step), 0, max(len(step) - 1, 0))
    start, end = segment.column("start_ns")[place], segment.column("end_ns")[place]
    is_late = (events.step > step[-1]) | ~(events.of_scheduling | (events.kind == KIND[COMMIT]))
    return np.maximum.accumulate(np.where(is_late, end, start))


def block_map(
    segments: list[Segment], num_blocks: int, edges_ns: np.ndarray, pauses: Mapping[int, int] | None = None
) -> BlockMap:
    """State at each of `edges_ns` [columns]; attempts follow one another, and each begins with an empty cache.

    `pauses` has what was taken off the edges within each attempt.
    """
    stride = -(-num_blocks // MOST_BLOCKS)
    chosen = np.arange(0, num_blocks, stride)
    state = np.zeros((len(chosen), len(edges_ns)), np.int8)
    for segment in segments:
        if segment.ledger is not None and segment.num_steps and len(segment.events):
            paused = (pauses or {}).get(segment.attempt.number, 0)
            _draw(segment, segment.ledger, chosen, edges_ns + paused, state)
    per_line = -(-len(chosen) // MOST_LINES)
    firsts = np.arange(0, len(chosen), per_line)
    counts = np.diff(np.append(firsts, len(chosen)))[:, None]

    def share(of_state: int) -> np.ndarray:
        return np.rint(np.add.reduceat(state == of_state, firsts, axis=0) * 100 / counts).astype(np.uint8)

    return BlockMap(used=share(1), cached=share(2), first_block=chosen[firsts], stride=stride)


def _draw(segment: Segment, ledger: Ledger, chosen: np.ndarray, edges_ns: np.ndarray, state: np.ndarray) -> None:
    """Writes the segment's states into `state`: 0 empty, 1 in use, 2 cached."""
    events = segment.events
    holds = ledger.hash_before[0] & (events.kind != KIND[EVICT])
    after = np.where(ledger.ref_count > 0, 1, np.where(holds, 2, 0)).astype(np.int8)
    times = event_times(segment)
    begin, end = int(segment.column("start_ns")[0]), int(segment.column("end_ns").max())
    columns = np.flatnonzero((edges_ns >= begin) & (edges_ns <= end))
    # Microseconds: a million blocks times the nanoseconds of a few hours would not fit into 64 bits.
    width = (end - begin) // 1000 + 2
    keys = events.block_id * width + np.clip((times - begin) // 1000, 0, width - 2)
    order = np.argsort(keys, kind="stable")
    sorted_keys, sorted_after = keys[order], after[order]
    wanted = chosen[:, None] * width + ((edges_ns[columns] - begin) // 1000)[None, :]
    found = np.searchsorted(sorted_keys, wanted.ravel(), "right").reshape(wanted.shape) - 1
    same = (found >= 0) & (events.block_id[order][np.maximum(found, 0)] == chosen[:, None])
    state[:, columns] = np.where(same, sorted_after[np.maximum(found, 0)], 0)
