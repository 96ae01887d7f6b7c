"""One thread that makes durable what a run has done: the records of its steps first, then the rows they finished."""

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs import disk

FLUSH_S = 5.0
# Bounds on what waits count values: a sequence of a step, a token of a prompt; some 30 bytes each at most.
MAX_PENDING = 2**20
"""Values that wait for the thread before the step loop waits too: up to 30 MB, some ten seconds of a fast GPU's."""
WAKE_AT = 2**16
"""Values that are worth a turn of the thread: about 160 decode steps of 256 sequences."""
VALUE_BYTES = 30
# The step loop may have to wait for the interpreter while the thread is at it: a go should take about 1 ms.
ITEMS_AT_ONCE = 64
"""Items that are taken over in one go."""
PAUSE_S = 0.0005
"""Between two goes, so that the step loop gets the interpreter at once and not after its switch interval."""
MAX_UNWRITTEN_BYTES = 2**23
"""Taken over and not yet on disk; beyond this everything is flushed early."""


class JournalError(RuntimeError):
    """What a run has done could not be written; the cause says why."""


class Stage(Protocol):
    """Where items of one kind go. Its methods are called by the journal's thread alone."""

    @property
    def num_bytes(self) -> int:
        """Added and not yet flushed, about."""
        ...

    def add(self, items: Sequence[Any], /) -> None: ...

    def flush(self) -> None:
        """What was added is on the disk when this returns."""
        ...


class Journal:
    """Takes items from the step loop and flushes them, stage after stage, in a thread of its own.

    The step loop only appends to a list. Every `flush_s` seconds, and earlier when there is much, the stages are
    flushed in their order: whatever stood in front of an item and belongs to an earlier stage is on the disk before
    the item is. So a row is there only together with the records of the steps that made it.

    Nothing is dropped: when more than `max_pending` values wait, the step loop waits. After the first error nothing
    more is written; the next `append` and `close` raise JournalError. Call `close`, also when the run fails: the thread
    does not keep the process alive, and what it has not flushed by then is lost.
    """

    def __init__(self, stages: Sequence[Stage], *, flush_s: float = FLUSH_S, max_pending: int = MAX_PENDING) -> None:
        if not (0.0 < flush_s < math.inf):
            raise ValueError(f"recorder.flush_s={flush_s}: must be a number of seconds above 0")
        self._stages = list(stages)
        self._flush_s = flush_s
        self._max_pending = max_pending
        self._changed = threading.Condition(threading.Lock())
        self._pending: list[tuple[Stage, Any]] = []
        self._num_pending = 0
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    # Called by the step loop

    def append(self, stage: Stage, item: Any, num_values: int) -> None:
        """`num_values` is about the item's size in units of VALUE_BYTES."""
        with self._changed:
            while self._num_pending >= self._max_pending and self._error is None:
                self._changed.wait()
            self._raise_error()
            if self._is_closed:
                raise ValueError("the journal is closed; nothing can follow")
            self._pending.append((stage, item))
            self._num_pending += num_values
            if self._num_pending >= self._wake_at:
                self._changed.notify()

    def close(self) -> None:
        """Flush what is left and stop; everything is on disk when this returns. A second call does nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_error()

    @property
    def is_sealed(self) -> bool:
        """Whether it is closed and everything that was appended is on the disk."""
        return self._is_closed and not self._thread.is_alive() and self._error is None

    @property
    def _wake_at(self) -> int:
        return min(WAKE_AT, self._max_pending)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise JournalError(_in_words(self._error)) from self._error

    # In the thread

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except BaseException as error:  # raised again in the step loop
            with self._changed:
                self._error = error
                self._pending = []
                self._changed.notify_all()

    def _write_until_closed(self) -> None:
        deadline = time.monotonic() + self._flush_s
        is_last = False
        while not is_last:
            items, is_last = self._take(deadline)
            for start in range(0, len(items), ITEMS_AT_ONCE):
                self._add(items[start : start + ITEMS_AT_ONCE])
                time.sleep(PAUSE_S)
                if sum(stage.num_bytes for stage in self._stages) >= MAX_UNWRITTEN_BYTES:
                    self._flush()
            if is_last or time.monotonic() >= deadline:
                deadline = time.monotonic() + self._flush_s
                self._flush()

    def _take(self, deadline: float) -> tuple[list[tuple[Stage, Any]], bool]:
        """What has come, once it is worth a turn or the deadline is there; and whether nothing more will come."""
        with self._changed:
            while not self._is_closed and self._num_pending < self._wake_at:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    break
                self._changed.wait(remaining_s)
            items, self._pending, self._num_pending = self._pending, [], 0
            self._changed.notify()
            return items, self._is_closed

    def _add(self, items: Sequence[tuple[Stage, Any]]) -> None:
        for stage in self._stages:
            own = [item for of, item in items if of is stage]
            if own:
                stage.add(own)

    def _flush(self) -> None:
        for stage in self._stages:
            stage.flush()


def _in_words(error: BaseException) -> str:
    """With the free space, where the disk is what failed: the first thing to look at."""
    text = f"what the run has done could not be written: {error}"
    if not isinstance(error, OSError):
        return text
    where = Path(error.filename).parent if isinstance(error.filename, str) else Path.cwd()
    return f"{text}; {disk.free_space(where)}"
