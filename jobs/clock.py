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

    @classmethod
    def resumed(cls, zero: datetime, not_before_ns: int) -> "Clock":
        """Counts from another clock's zero, by the wall clock: a restarted machine has another monotonic one.

        Its first reading is at least `not_before_ns`, the last one that is known of the other, even where the wall
        clock has been set back in between.
        """
        clock = cls()
        elapsed_ns = int((clock.zero - zero).total_seconds() * 1e9)
        clock._zero_ns -= max(elapsed_ns, not_before_ns)
        clock.zero = zero
        return clock

    def now_ns(self) -> int:
        return time.monotonic_ns() - self._zero_ns
