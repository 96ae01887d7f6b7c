"""Python's garbage collector kept out of the step loop, where a full collection would cost more than a step."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_S = 60.0
"""Time between collections, so that a job of days does not gather garbage that reference counts cannot free."""


@contextmanager
def collector_kept_out(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[], None]]:
    """No collection starts by itself inside; what is alive at the start is never looked through again.

    Gives a function to call between steps, which collects once in INTERVAL_S. `clock` gives seconds.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    due = clock() + INTERVAL_S

    def between_steps() -> None:
        nonlocal due
        if clock() >= due:
            gc.collect()
            due = clock() + INTERVAL_S

    try:
        yield between_steps
    finally:
        if was_enabled:
            gc.enable()
        gc.unfreeze()
