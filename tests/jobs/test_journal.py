"""The journal: its order, when it flushes, and what an error of the disk does."""

import threading
import time
from collections.abc import Sequence

import pytest

import jobs.journal
from jobs.journal import Journal, JournalError


class Stage:
    """Notes what is done to it in a list that all stages of a test share."""

    def __init__(self, name: str, done: list[str], error: OSError | None = None) -> None:
        self.name = name
        self.num_bytes = 0
        self._done = done
        self._error = error

    def add(self, items: Sequence[str]) -> None:
        self.num_bytes += len(items)
        self._done += [f"{self.name} takes {item}" for item in items]

    def flush(self) -> None:
        if self._error is not None:
            raise self._error
        if self.num_bytes:
            self._done.append(f"{self.name} flushed")
        self.num_bytes = 0


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_an_earlier_stage_is_flushed_first_and_has_everything_that_came_before():
    done: list[str] = []
    records, rows = Stage("records", done), Stage("rows", done)
    journal = Journal([records, rows], flush_s=1000.0)
    for number in range(3):
        journal.append(records, f"step {number}", 1)
        journal.append(rows, f"row {number}", 1)
    assert done == [], "nothing is written before it is time"
    journal.close()
    flushed = [what for what in done if what.endswith("flushed")]
    assert flushed == ["records flushed", "rows flushed"]
    for number in range(3):
        assert done.index(f"records takes step {number}") < done.index("rows flushed")


def test_it_flushes_every_interval():
    done: list[str] = []
    rows = Stage("rows", done)
    journal = Journal([rows], flush_s=0.02)
    journal.append(rows, "a", 1)
    wait_until(lambda: "rows flushed" in done)
    journal.append(rows, "b", 1)
    wait_until(lambda: done.count("rows flushed") == 2)
    journal.close()


def test_it_flushes_early_when_there_is_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs.journal, "MAX_UNWRITTEN_BYTES", 3)
    done: list[str] = []
    rows = Stage("rows", done)
    journal = Journal([rows], flush_s=1000.0, max_pending=4)
    for number in range(4):
        journal.append(rows, str(number), 1)
    wait_until(lambda: "rows flushed" in done)
    journal.close()


def test_after_an_error_nothing_more_is_written_and_everybody_hears_of_it():
    done: list[str] = []
    records, rows = Stage("records", done, OSError(28, "No space left on device")), Stage("rows", done)
    journal = Journal([records, rows], flush_s=0.01)
    journal.append(rows, "a", 1)
    wait_until(lambda: journal._error is not None)
    with pytest.raises(JournalError, match=r"No space left on device; [\d,]+ bytes and [\d,]+ inodes are free in "):
        journal.append(rows, "b", 1)
    for _ in range(2):
        with pytest.raises(JournalError, match="No space left on device"):
            journal.close()
    assert "rows flushed" not in done, "no row without its records"


def test_when_it_falls_behind_the_step_loop_waits():
    go_on = threading.Event()

    class Slow(Stage):
        def add(self, items: Sequence[str]) -> None:
            go_on.wait(10)
            super().add(items)

    done: list[str] = []
    rows = Slow("rows", done)
    journal = Journal([rows], flush_s=0.01, max_pending=10)
    appended = 0

    def step_loop() -> None:
        nonlocal appended
        for number in range(100):
            journal.append(rows, str(number), 1)
            appended += 1

    loop = threading.Thread(target=step_loop)
    loop.start()
    time.sleep(0.2)
    assert appended < 60, "the step loop did not wait"
    go_on.set()
    loop.join(10)
    journal.close()
    assert sum(what.startswith("rows takes") for what in done) == 100


def test_nothing_can_follow_once_it_is_closed():
    rows = Stage("rows", [])
    journal = Journal([rows])
    journal.close()
    with pytest.raises(ValueError, match="the journal is closed"):
        journal.append(rows, "a", 1)
