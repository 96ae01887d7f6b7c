"""Ends a run whose loop makes no progress, and says where it hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Self

POLLS = 8
"""In the time without progress that is allowed. Polls are counted, not seconds: a process that was stopped and goes on
has missed them."""
LAST_RESORT = 1.5
"""Times that time, after which a process whose interpreter lock is never given up is ended from outside of Python."""
EXIT_CODE = 1


class Watchdog:
    """While it is open, a loop must count up `beats` at least every `limit_s` seconds; 0 watches nothing.

    Otherwise the state of the run and the stacks of all threads go to `log_file`, `give_up` is told why, and the
    process ends with exit code 1, at once: the main thread hangs, so nothing can be unwound. What is acknowledged is on
    the disk already. Where the main thread hangs in C and keeps the interpreter lock, no other thread can run: then
    faulthandler, which needs no lock, writes the stacks and ends the process with the same code, half of `limit_s`
    later and without `give_up`.

    A beat costs an addition; a thread looks eight times in `limit_s`. Open it in the main thread.
    """

    def __init__(
        self, limit_s: float, log_file: Path, describe: Callable[[], str], give_up: Callable[[str], object]
    ) -> None:
        """`describe` gives the state in a few lines; it and `give_up` are called in the watchdog's thread."""
        self.beats = 0
        self._limit_s = limit_s
        self._log_file = log_file
        self._describe = describe
        self._give_up = give_up
        self._done = threading.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._limit_s > 0:
            log = self._stack.enter_context(open(self._log_file, "a", encoding="utf-8"))
            self._stack.enter_context(_unarmed_while_suspended(lambda: self._arm(log)))
            self._arm(log)
            self._stack.callback(faulthandler.cancel_dump_traceback_later)
            thread = threading.Thread(target=self._watch, args=(log,), name="watchdog", daemon=True)
            thread.start()
            self._stack.callback(thread.join)
            self._stack.callback(self._done.set)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _arm(self, log: IO[str]) -> None:
        faulthandler.dump_traceback_later(LAST_RESORT * self._limit_s, exit=True, file=log)

    def _watch(self, log: IO[str]) -> None:
        seen, num_missed = self.beats, 0
        while not self._done.wait(self._limit_s / POLLS):
            self._arm(log)
            if self.beats != seen:
                seen, num_missed = self.beats, 0
                continue
            num_missed += 1
            if num_missed >= POLLS:
                self._end(log)

    def _end(self, log: IO[str]) -> None:
        reason = f"no progress for {self._limit_s:g} s (watchdog_s)"
        try:
            # Not through logging, whose lock the thread that hangs may hold.
            log.write(f"[{datetime.now(UTC).astimezone():%Y-%m-%d %H:%M:%S}] [jobs.watchdog] [ERROR] {reason}\n")
            log.write(f"{self._state()}\n")
            log.flush()
            faulthandler.dump_traceback(file=log, all_threads=True)
            print(f"error: {reason}; state and stacks are in {self._log_file}", file=sys.stderr, flush=True)
            self._give_up(reason)
        finally:
            os._exit(EXIT_CODE)

    def _state(self) -> str:
        try:
            return self._describe()
        except Exception as error:  # in the middle of a change, whatever it was
            return f"the state cannot be told: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _unarmed_while_suspended(arm: Callable[[], None]) -> Iterator[None]:
    """Ctrl-Z stops the process, not the clock of the last resort."""

    def suspend(signum: int, frame: FrameType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)
        arm()

    before = signal.getsignal(signal.SIGTSTP)
    if before is not signal.SIG_DFL:  # ignored, as without job control, or another's
        yield
        return
    signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
