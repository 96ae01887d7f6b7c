"""The one clock of a run."""

import time
from datetime import UTC, datetime


class Clock:
    """Counts monotonic nanoseconds from its creation; `zero` is that instant on the wall clock.

    Every time in a run directory is a reading of this clock, so differences between them are exact even when the
    wall clock is set during the run.
    """

    def __init__(self) -> None:
        self._zero_ns = time.monotonic_ns()
        self.zero = datetime.now(UTC)

    def now_ns(self) -> int:
        return time.monotonic_ns() - self._zero_ns
