"""Who uses the interpreter: the step loop first, and beside it threads that work ahead."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.engine.plan import Plan, Runner, StepResult

TURN_S = 0.0002
"""Python's own 5 ms are two steps of a small model: every call of the loop that lets the interpreter go, and a launch
is some ten, may cost that much while rows are read or records encoded. On an H200 `shared`, a run of 1.3 s, waited for
its host 30 ms instead of 84."""
PATIENCE_S = 0.005
"""After which a thread that gives way goes on, if only by a row: 200 rows/s, should the loop never wait."""


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads that want the interpreter get it from one another after TURN_S inside."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Turns:
    """Lets threads that work ahead do so while the step loop waits: for the device, or for them.

    Nobody is locked out: a thread that gives way goes on after PATIENCE_S at the latest.
    """

    def __init__(self) -> None:
        self._loop_waits = threading.Event()
        self._loop_waits.set()

    @contextmanager
    def of_loop(self) -> Iterator[None]:
        """The loop is at work inside, but for its `waiting`."""
        self._loop_waits.clear()
        try:
            yield
        finally:
            self._loop_waits.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The loop waits inside."""
        was_waiting = self._loop_waits.is_set()
        self._loop_waits.set()
        try:
            yield
        finally:
            if not was_waiting:
                self._loop_waits.clear()

    def give_way(self) -> None:
        """For the others, between two rows."""
        self._loop_waits.wait(PATIENCE_S)


class GivingWay:
    """A Runner whose waiting is that of the step loop: for a device that works beside the host, or as a step runs."""

    def __init__(self, runner: Runner, turns: Turns) -> None:
        self.lookahead = runner.lookahead
        self._runner = runner
        self._turns = turns

    def submit(self, plan: Plan) -> None:
        if self.lookahead:
            self._runner.submit(plan)
        else:
            with self._turns.waiting():
                self._runner.submit(plan)

    def collect(self) -> StepResult:
        with self._turns.waiting():
            return self._runner.collect()
