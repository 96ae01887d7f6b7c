"""How far the job is: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TextIO

from tqdm import tqdm

from jobs.progress_file import ProgressFile

MODES = ("auto", "on", "off")
LINE_INTERVAL_S = 30.0
"""Between two lines where there is no terminal."""
INTERVAL_S = 1.0
"""Between two estimates of the time left, and two versions of the file."""
RATE_WINDOW_S = 30.0
"""The rates shown are those of the latest seconds, as many as these."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the latest seconds."""

    rows_per_s: float
    tokens_per_s: float
    steps_per_s: float


class Progress:
    """Rows done, output tokens a second, time left and failures, on standard error and in `file`.

    `auto` draws a bar on a terminal and elsewhere writes one line every 30 s, `on` draws the bar wherever it goes,
    `off` writes nothing. Both end with a last state when closed. The file is written whatever the mode, once a second
    and at the end.

    Log lines that go to the same terminal must be written to `log_stream`, which takes the bar away and puts it back;
    without a bar it hands everything on.

    A terminal that has gone away ends the display, never the job. `update` is cheap enough to be called after each
    step: it draws at most ten times a second. Log lines may come from any thread, updates from one.
    """

    def __init__(
        self,
        mode: str = "auto",
        total_rows: int | None = None,
        *,
        rows_before: int = 0,
        file: ProgressFile | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rows_before` were done by earlier attempts."""
        if mode not in MODES:
            raise ValueError(f"progress={mode}: must be one of {', '.join(MODES)}")
        stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._rates = _Rates(clock(), rows_before)
        self._total_rows = total_rows
        self._file = file
        self._state = _State(rows_before, 0, 0, 0, None)
        self._due_s = clock() + INTERVAL_S
        self._display = _display(mode, total_rows, stream, clock())
        self.log_stream = LogStream(stream, self._display if isinstance(self._display, _Bar) else None)
        """For the handler of the text log: logging.StreamHandler(progress.log_stream)."""

    def update(
        self,
        rows_done: int,
        output_tokens: int,
        failures: int,
        steps: int = 0,
        seconds_left: Callable[[Pace], float | None] = lambda pace: None,
    ) -> None:
        """The state now: rows done (answered and failed) of all attempts, the rest counted from this one's start.

        `seconds_left` is asked once a second at most.
        """
        now_s = self._clock()
        self._rates.add(now_s, rows_done, output_tokens, steps)
        left_s = self._state.seconds_left
        if is_due := now_s >= self._due_s:
            self._due_s = now_s + INTERVAL_S
            left_s = seconds_left(self._rates.pace())
        self._state = _State(rows_done, output_tokens, failures, steps, left_s)
        if is_due:
            self._write("running")
        self._show(self._display.show)

    def close(self) -> None:
        """Shows the last state and leaves it there. A second call does nothing."""
        self._show(self._display.close)
        self._display = _Silence()
        is_complete = self._state.rows_done == self._total_rows
        self._state = self._state._replace(seconds_left=0.0 if is_complete else None)
        self._write("ended")
        self._file = None

    def _show(self, action: "Callable[[_Rates, _State], None]") -> None:
        try:
            action(self._rates, self._state)
        except (OSError, ValueError):  # a closed file is a ValueError
            self.log_stream.detach()
            self._display.abandon()
            self._display = _Silence()

    def _write(self, status: str) -> None:
        if self._file is None:
            return
        state, pace = self._state, self._rates.pace()
        self._file.write(
            {
                "status": status,
                "rows_total": self._total_rows,
                "rows_done": state.rows_done,
                "rows_failed": state.failures,
                "output_tokens": state.output_tokens,
                "steps": state.steps,
                "rows_per_s": round(pace.rows_per_s, 3),
                "output_tokens_per_s": round(pace.tokens_per_s, 3),
                "elapsed_s": round(self._rates.now_s - self._rates.start_s, 3),
                "seconds_left": None if state.seconds_left is None else round(state.seconds_left, 1),
            }
        )


class _State(NamedTuple):
    rows_done: int
    output_tokens: int
    failures: int
    steps: int
    seconds_left: float | None


class LogStream:
    """Text lines beside a progress bar, or plainly to `stream` without one; nowhere when there is no stream."""

    def __init__(self, stream: TextIO | None, bar: "_Bar | None") -> None:
        self._stream = stream
        self._bar = bar

    def write(self, text: str) -> int:
        if self._stream is None:
            return len(text)
        if self._bar is None:
            return self._stream.write(text)
        with self._bar.away():
            return self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def detach(self) -> None:
        """Knows of no bar any more."""
        self._bar = None


class _Rates:
    """Rows, output tokens and steps a second over the latest RATE_WINDOW_S."""

    def __init__(self, start_s: float, rows: int) -> None:
        self.start_s = start_s
        self.now_s = start_s
        self._marks: deque[tuple[float, int, int, int]] = deque([(start_s, rows, 0, 0)])

    def add(self, now_s: float, rows: int, tokens: int, steps: int) -> None:
        self.now_s = now_s
        marks = self._marks
        if len(marks) > 1 and now_s - marks[-2][0] < 1.0:
            marks.pop()
        marks.append((now_s, rows, tokens, steps))
        while len(marks) > 2 and now_s - marks[1][0] >= RATE_WINDOW_S:
            marks.popleft()

    def pace(self) -> Pace:
        return Pace(self._per_s(1), self._per_s(2), self._per_s(3))

    def tokens_per_s(self) -> float:
        return self._per_s(2)

    def _per_s(self, count: int) -> float:
        first, last = self._marks[0], self._marks[-1]
        elapsed_s = last[0] - first[0]
        return (last[count] - first[count]) / elapsed_s if elapsed_s > 0 else 0.0


class _Silence:
    def show(self, rates: _Rates, state: _State) -> None: ...

    def close(self, rates: _Rates, state: _State) -> None: ...

    def abandon(self) -> None: ...


class _Lines:
    """A line every LINE_INTERVAL_S, written in one piece, and one at the end."""

    def __init__(self, stream: TextIO, total_rows: int | None, start_s: float) -> None:
        self._stream = stream
        self._total_rows = total_rows
        self._shown_s = start_s

    def show(self, rates: _Rates, state: _State) -> None:
        if rates.now_s - self._shown_s < LINE_INTERVAL_S:
            return
        self._shown_s = rates.now_s
        self._write([self._rows(state.rows_done), *_facts(rates, state)])

    def close(self, rates: _Rates, state: _State) -> None:
        elapsed = tqdm.format_interval(rates.now_s - rates.start_s)
        tokens = f"{state.output_tokens} output tokens in {elapsed}"
        self._write([self._rows(state.rows_done), tokens, *_failed(state.failures)])

    def abandon(self) -> None:
        """There is nothing to write to any more."""

    def _rows(self, rows_done: int) -> str:
        return f"{rows_done} rows" if self._total_rows is None else f"{rows_done}/{self._total_rows} rows"

    def _write(self, parts: list[str]) -> None:
        self._stream.write(f"progress: {', '.join(parts)}\n")
        self._stream.flush()


class _TerminalBar(tqdm):
    """tqdm without its thread and without its lock between processes: no other process draws on this terminal."""

    monitor_interval = 0
    _lock = threading.RLock()


class _Bar:
    """A tqdm bar."""

    def __init__(self, stream: TextIO, total_rows: int | None) -> None:
        counts = "{n_fmt} rows" if total_rows is None else "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows"
        self._bar = _TerminalBar(
            total=total_rows,
            file=stream,
            dynamic_ncols=True,
            miniters=0,
            bar_format=f"{counts} [{{elapsed}}{{postfix}}]",
        )

    def show(self, rates: _Rates, state: _State) -> None:
        self._bar.set_postfix_str(", ".join(_facts(rates, state)), refresh=False)
        self._bar.update(state.rows_done - self._bar.n)

    def close(self, rates: _Rates, state: _State) -> None:
        self._bar.close()

    def abandon(self) -> None:
        """There is nothing to draw on any more, not even when the bar is collected."""
        self._bar.disable = True

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nothing of the bar is on the screen meanwhile, and no other thread draws."""
        with self._bar.get_lock():
            if self._bar.disable:  # closed: its last state stays where it is
                yield
                return
            self._bar.clear(nolock=True)
            yield
            self._bar.refresh(nolock=True)


def _display(mode: str, total_rows: int | None, stream: TextIO | None, start_s: float) -> _Silence | _Lines | _Bar:
    if mode == "off" or stream is None:  # a process without standard error has no sys.stderr
        return _Silence()
    if mode == "on" or stream.isatty():
        return _Bar(stream, total_rows)
    return _Lines(stream, total_rows, start_s)


def _facts(rates: _Rates, state: _State) -> list[str]:
    left_s = state.seconds_left
    left = [] if left_s is None else [f"about {tqdm.format_interval(round(left_s))} left"]
    return [f"{rates.tokens_per_s():.0f} output tok/s", *left, *_failed(state.failures)]


def _failed(failures: int) -> list[str]:
    return [f"{failures} failed"] if failures else []
