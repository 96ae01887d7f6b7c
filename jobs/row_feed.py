"""Rows read ahead by a thread, so that a slow input never holds up the step loop or a signal."""

import queue
import threading
from collections.abc import Iterable

from jobs.rows import BadRow, InputRow
from jobs.stop import StopRequest

POLL_S = 0.1
"""How often a wait for the next row looks for a signal."""


class RowFeed:
    """The rows of an input, at most `capacity` of them read ahead.

    What the reading raises is raised by `take`, in its place among the rows. The thread does not keep the process
    alive: a pipe that never ends cannot either.
    """

    def __init__(self, rows: Iterable[InputRow | BadRow], capacity: int) -> None:
        self._queue: queue.Queue[InputRow | BadRow | _End] = queue.Queue(capacity)
        self._next: InputRow | BadRow | _End | None = None
        self._thread = threading.Thread(target=self._read, args=(rows,), name="row-feed", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether every row has been taken, and `take` has said so."""
        return isinstance(self._next, _End)

    def wait_for_first(self, stop: StopRequest) -> None:
        """Until the first row is there, or it is known that there is none; raises what the reading raised."""
        while self._next is None:
            stop.check()
            self._fetch(POLL_S)
        if isinstance(self._next, _End):
            self._next.raise_error()

    def take(self, wait: bool, stop: StopRequest) -> InputRow | BadRow | None:
        """The next row; None at the end, or, without `wait`, when none has been read yet."""
        while self._next is None:
            if not self._fetch(POLL_S if wait else 0.0):
                if not wait:
                    return None
                stop.check()
        if isinstance(self._next, _End):
            self._next.raise_error()
            return None
        row, self._next = self._next, None
        return row

    def _fetch(self, timeout: float) -> bool:
        try:
            self._next = self._queue.get(timeout > 0, timeout or None)
        except queue.Empty:
            return False
        return True

    def _read(self, rows: Iterable[InputRow | BadRow]) -> None:
        try:
            for row in rows:
                self._queue.put(row)
            self._queue.put(_End(None))
        except BaseException as error:  # raised again in the step loop
            self._queue.put(_End(error))


class _End:
    """Behind the last row."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error
