"""Rows got ready ahead by a thread, so that a slow source never holds up the step loop or a signal."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from jobs.stop import StopRequest
from jobs.turns import Turns

POLL_S = 0.1
"""How often a wait for the next row looks for a signal."""
MAX_WEIGHT = 64 * 1024**2
"""Of the rows that wait to be taken, as `weight` counts it: few rows of the largest size, however many may wait."""

TAKEN_AT_ONCE = 1 / 8
"""Of the capacity: so many rows leave the queue together. One by one, a loop that takes many rows in a row waits for
the lock, and for the interpreter, each time (128 rows of 512 tokens took 5 to 19 ms while the feeds filled; together,
and with feeds that give way, 2 to 5)."""

RowT = TypeVar("RowT")


class RowFeed(Generic[RowT]):
    """The rows of a source in its order, at most `capacity` of them got ready ahead, and an eighth taken at once.

    What the source raises is raised by `take`, in its place among the rows. The thread does not keep the process
    alive: a pipe that never ends cannot either. Feeds may follow one another: the source of the second takes from the
    first, with `take_many`.
    """

    def __init__(
        self,
        rows: Iterable[RowT],
        capacity: int,
        weight: Callable[[RowT], int] = lambda row: 0,
        turns: Turns | None = None,
    ) -> None:
        """`weight` of a row is about its size in bytes. With `turns` the thread gives way to a loop that takes rows."""
        self._turns = turns or Turns()
        self._capacity = capacity
        self._at_once = max(1, int(capacity * TAKEN_AT_ONCE))
        self._weight_of = weight
        self._ready: deque[tuple[RowT, int]] = deque()
        self._weight = 0
        self._taken: deque[RowT] = deque()  # out of `_ready` already, for `take` alone
        self._changed = threading.Condition()
        self._source_ended = False
        self._error: BaseException | None = None
        self._closed = False
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(rows,), name="row-feed", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether every row has been taken, and `take` has said so."""
        return self._ended

    def wait_for_first(self, stop: StopRequest) -> None:
        """Until the first row is there, or it is known that there is none; raises what the source raised."""
        with self._changed:
            while not self._ready and not self._source_ended:
                stop.check()
                self._changed.wait(POLL_S)
            if not self._ready:
                self._end()

    def take(self, wait: bool, stop: StopRequest, waiting: Callable[[], None] = lambda: None) -> RowT | None:
        """The next row; None at the end, or, without `wait`, when none is ready.

        `waiting` is called again and again while there is none.
        """
        if self._taken:
            return self._taken.popleft()
        with self._changed:
            while not self._ready:
                if self._source_ended:
                    self._end()
                    return None
                if not wait:
                    return None
                stop.check()
                waiting()
                with self._turns.waiting():
                    self._changed.wait(POLL_S)
            self._taken += self._pop(self._at_once, MAX_WEIGHT * TAKEN_AT_ONCE)
        return self._taken.popleft()

    def take_many(self, most: int) -> list[RowT]:
        """As many rows as are ready, at least one, at most `most`; none at the end.

        For another feed's thread, on a feed that `take` is not used on.
        """
        with self._changed:
            while not self._ready and not self._source_ended:
                self._changed.wait()
            if not self._ready:
                self._end()
            return self._pop(most, math.inf)

    def close(self, patience_s: float = 0.0) -> None:
        """Takes nothing more from the source, and waits so long for the thread to be done with it; `take` has nothing
        more either, whose thread must be the one that closes.

        A thread that waits for a pipe is left behind; it ends with the process.
        """
        with self._changed:
            self._closed = self._source_ended = True
            self._ready.clear()
            self._taken.clear()
            self._changed.notify_all()
        self._thread.join(patience_s)

    def _pop(self, most: int, most_weight: float) -> list[RowT]:
        """One row that is ready, and more while they are few and light."""
        rows: list[RowT] = []
        popped = 0
        while self._ready and len(rows) < most and (not rows or popped + self._ready[0][1] <= most_weight):
            row, weight = self._ready.popleft()
            rows.append(row)
            popped += weight
        self._weight -= popped
        self._changed.notify_all()
        return rows

    def _end(self) -> None:
        if self._error is not None:
            raise self._error
        self._ended = True

    def _read(self, rows: Iterable[RowT]) -> None:
        error = None
        try:
            for row in rows:
                if not self._put(row):
                    break
                if len(self._ready) > self._capacity // 2:  # with fewer, the loop might soon wait for them
                    self._turns.give_way()
        except BaseException as caught:  # raised again where the rows are taken
            error = caught
        with self._changed:
            self._error = error
            self._source_ended = True
            self._changed.notify_all()

    def _put(self, row: RowT) -> bool:
        """Once there is room; False when nothing is wanted any more."""
        weight = self._weight_of(row)
        with self._changed:
            while not self._closed and (
                len(self._ready) >= self._capacity or (self._ready and self._weight + weight > MAX_WEIGHT)
            ):
                self._changed.wait()
            if self._closed:
                return False
            self._ready.append((row, weight))
            self._weight += weight
            self._changed.notify_all()
            return True
