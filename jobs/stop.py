"""How SIGINT and SIGTERM reach the main thread."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(KeyboardInterrupt):
    """The user asked the run to end. A KeyboardInterrupt, so that `except Exception` lets it pass."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[signal.Signals(self.signum)]


class StopRequest:
    """Turns SIGINT and SIGTERM into `Stopped` in the main thread, while `installed()` is open.

    Outside `deferred()` the first signal raises at once, as Ctrl-C does in any Python program: loading a model can
    be broken off. Inside, the first signal only sets `requested`; the job calls `check()` between two steps, which
    raises `Stopped` there, where everything can be sealed. A second signal raises at once wherever it arrives.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The first signal that arrived."""
        self._react: Callable[[int, bool], None] = self._stop

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raises `Stopped` if a signal has arrived."""
        if self.signum is not None:
            raise Stopped(self.signum)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handlers are in place; those that were there before come back."""
        before = {signum: signal.signal(signum, self._on_signal) for signum in EXIT_CODES}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Until the block ends, the first signal waits for `check()`."""
        with self._reacting(self._stop_if_again):
            yield

    @contextmanager
    def forwarded(self, receive: Callable[[int], object]) -> Iterator[None]:
        """Until the block ends, every signal is handed to `receive` (a child process) and raises nothing here."""

        def hand_on(signum: int, first: bool) -> None:
            receive(signum)

        with self._reacting(hand_on):
            yield

    def ignore(self) -> None:
        """From now on signals change nothing: the run is over and its last file is being written."""
        self._react = lambda signum, first: None

    @contextmanager
    def _reacting(self, react: Callable[[int, bool], None]) -> Iterator[None]:
        before, self._react = self._react, react
        try:
            yield
        finally:
            self._react = before

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        first = self.signum is None
        self.signum = self.signum or signum
        self._react(signum, first)

    def _stop(self, signum: int, first: bool) -> None:
        raise Stopped(self.signum or signum)

    def _stop_if_again(self, signum: int, first: bool) -> None:
        if not first:
            self._stop(signum, first)
