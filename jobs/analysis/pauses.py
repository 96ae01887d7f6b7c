"""The time between attempts, in which nothing ran: no plot has room for a night."""

from collections.abc import Sequence

import numpy as np

from jobs.analysis.segments import Segment
from jobs.analysis.time_ledger import span


def pauses_before(segments: Sequence[Segment]) -> dict[int, int]:
    """Nanoseconds without an attempt before each attempt, summed from the run's start.

    Taken off an attempt's times they leave the axis of which the time ledger speaks, where attempts follow one another.
    """
    found: dict[int, int] = {}
    paused = last = 0
    for number in sorted({segment.attempt.number for segment in segments}):
        spans = [span(segment) for segment in segments if segment.attempt.number == number]
        start, end = min(one.start_ns for one in spans), max(one.end_ns for one in spans)
        if found:
            paused += max(start - last, 0)
        found[number] = paused
        last = max(last, end)
    return found


def of_steps(pauses: dict[int, int], attempts: np.ndarray) -> np.ndarray:
    """[steps] The pauses before each step's attempt."""
    known = np.zeros(int(attempts.max(initial=0)) + 1, np.int64)
    for number, paused in pauses.items():
        if number < len(known):
            known[number] = paused
    return known[attempts]
