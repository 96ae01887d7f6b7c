"""What each sequence did over time: pieces of a bar chart, in whole columns."""

import heapq
from dataclasses import dataclass

import numpy as np

from jobs.analysis.segments import Segment

WAITING, PREFILL, DECODE, PREEMPTED = range(4)
KINDS = ("waiting", "prefill", "decode", "preempted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Pieces of sequences' lives, [pieces]; those of one sequence do not overlap."""

    seq_id: np.ndarray
    kind: np.ndarray
    """Place in KINDS."""
    start_ns: np.ndarray
    end_ns: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """The entries of a segment's sequences, sorted by sequence and step, and where a new life of one begins.

    A life is what lies between two preemptions, the first one from the beginning.
    """

    order: np.ndarray
    """Entries of `sequences`, sorted."""
    begins: np.ndarray
    """[entries, sorted] Whether a life begins here."""
    is_first: np.ndarray
    """[entries, sorted] Whether it is the sequence's first entry."""


def lives(segment: Segment) -> Lives:
    flat = segment.sequences
    order = np.lexsort((flat.step_row, flat.seq_id))
    seq_id, step_row = flat.seq_id[order], flat.step_row[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = seq_id[1:] != seq_id[:-1]
    begins = is_first.copy()
    at, preempted = segment.id_lists("preempted_seq_ids")
    if len(at):
        width = segment.num_steps + 1
        keys = np.sort(preempted * width + at)
        gone = np.searchsorted(keys, seq_id * width + step_row, "right")
        begins[1:] |= gone[1:] > gone[:-1]
    return Lives(order=order, begins=begins, is_first=is_first)


def pieces(segment: Segment) -> Pieces:
    """Waiting until the first step, each chunk of a prefill, decoding, and from a preemption until it runs again."""
    parts = [_waiting(segment)]
    if segment.num_steps:
        found = lives(segment)
        parts += [_prefills(segment, found), _decodes(segment, found), _preempted(segment, found)]
    return Pieces(
        seq_id=np.concatenate([part.seq_id for part in parts]),
        kind=np.concatenate([part.kind for part in parts]),
        start_ns=np.concatenate([part.start_ns for part in parts]),
        end_ns=np.concatenate([part.end_ns for part in parts]),
    )


def _pieces(kind: int, seq_id: np.ndarray, start_ns: np.ndarray, end_ns: np.ndarray) -> Pieces:
    return Pieces(seq_id=seq_id, kind=np.full(len(seq_id), kind, np.int8), start_ns=start_ns, end_ns=end_ns)


def _waiting(segment: Segment) -> Pieces:
    first, finished = segment.request("first_scheduled_ns"), segment.request("finished_ns")
    end = np.where(first < 0, finished, first)
    return _pieces(WAITING, segment.request("seq_id"), segment.request("arrived_ns"), end)


def is_prefill(segment: Segment) -> np.ndarray:
    """[entries of `sequences`] A batch has its decodes first."""
    flat, count = segment.sequences, segment.num_steps
    sizes = np.bincount(flat.step_row, minlength=count)
    place = np.arange(len(flat.step_row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place >= segment.column("num_decode_tokens")[flat.step_row]


def _prefills(segment: Segment, found: Lives) -> Pieces:
    prefills = is_prefill(segment)[found.order]
    start, end = _times(segment, found)
    # With look-ahead the next chunk is scheduled while this one runs.
    follows = np.zeros(len(prefills), np.bool_)
    follows[1:] = prefills[:-1] & ~found.begins[1:]
    start[1:] = np.where(follows[1:], np.maximum(start[1:], end[:-1]), start[1:])
    return _pieces(PREFILL, segment.sequences.seq_id[found.order][prefills], start[prefills], end[prefills])


def _decodes(segment: Segment, found: Lives) -> Pieces:
    decodes = ~is_prefill(segment)[found.order]
    start, end = _times(segment, found)
    is_start = decodes & found.begins
    is_start[1:] |= decodes[1:] & ~decodes[:-1]
    is_end = decodes.copy()
    is_end[:-1] &= ~decodes[1:] | found.begins[1:]
    firsts = np.flatnonzero(is_start)
    before = np.where(found.begins[firsts], start[firsts], end[np.maximum(firsts - 1, 0)])
    return _pieces(DECODE, segment.sequences.seq_id[found.order][firsts], before, end[is_end])


def _preempted(segment: Segment, found: Lives) -> Pieces:
    again = np.flatnonzero(found.begins & ~found.is_first)
    seq_id, step_row = segment.sequences.seq_id[found.order][again], segment.sequences.step_row[found.order][again]
    at, preempted = segment.id_lists("preempted_seq_ids")
    width = segment.num_steps + 1
    keys = np.sort(preempted * width + at)
    gone = keys[np.searchsorted(keys, seq_id * width + step_row, "right") - 1] % width if len(again) else again
    start, end = segment.column("start_ns"), segment.column("end_ns")
    last = segment.sequences.step_row[found.order][again - 1]  # it may have been under way when its row was preempted
    return _pieces(PREEMPTED, seq_id, np.maximum(start[gone], end[last]), start[step_row])


def _times(segment: Segment, found: Lives) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each sorted entry's step."""
    rows = segment.sequences.step_row[found.order]
    return segment.column("start_ns")[rows], segment.column("end_ns")[rows]


def lanes(start_ns: np.ndarray, end_ns: np.ndarray) -> np.ndarray:
    """A lane for each interval, as few as possible, so that those of one lane do not overlap."""
    lane = np.zeros(len(start_ns), np.int64)
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    used = 0
    for i in np.argsort(start_ns, kind="stable").tolist():
        while busy and busy[0][0] <= start_ns[i]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(used)
            used += 1
        lane[i] = heapq.heappop(free)
        heapq.heappush(busy, (int(end_ns[i]), int(lane[i])))
    return lane
