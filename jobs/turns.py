"""How long another thread may keep the interpreter while the step loop waits for it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

TURN_S = 0.0002
"""Python's own 5 ms are two steps of a small model: every call of the loop that lets the interpreter go, and a launch
is some ten, may cost that much while rows are read or records encoded. On an H200 `shared`, a run of 1.3 s, waited for
its host 30 ms instead of 84."""


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads that want the interpreter get it from one another after TURN_S inside."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
