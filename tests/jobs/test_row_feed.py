"""Rows read ahead: in order, bounded, and never in the way of a signal."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from jobs.row_feed import MAX_WEIGHT, RowFeed
from jobs.rows import InputRow
from jobs.stop import Stopped, StopRequest
from jobs.turns import PATIENCE_S, Turns


def rows(count: int) -> Iterator[InputRow]:
    for row in range(count):
        yield InputRow(file="f", line=row + 1, row=row, id=row, prompt="x")


def test_rows_come_in_order_and_then_none():
    feed, stop = RowFeed(rows(100), capacity=3), StopRequest()
    feed.wait_for_first(stop)
    taken = [feed.take(True, stop) for _ in range(100)]
    assert [row.row for row in taken if row is not None] == list(range(100))
    assert not feed.ended
    assert feed.take(True, stop) is None
    assert feed.ended
    assert feed.take(False, stop) is None


def test_an_empty_input_ends_at_once():
    feed, stop = RowFeed(rows(0), capacity=3), StopRequest()
    feed.wait_for_first(stop)
    assert feed.take(True, stop) is None
    assert feed.ended


def test_no_more_than_capacity_is_read_ahead():
    read = itertools.count()
    feed = RowFeed((row for row in rows(1000) if next(read) >= 0), capacity=5)
    feed.wait_for_first(StopRequest())
    time.sleep(0.2)
    assert next(read) <= 5 + 1 + 1  # queued, taken as the first, and one that waits for a place


def test_what_the_reading_raises_comes_in_its_place():
    def broken() -> Iterator[InputRow]:
        yield from rows(2)
        raise OSError("the disk is gone")

    feed, stop = RowFeed(broken(), capacity=10), StopRequest()
    assert [feed.take(True, stop).row for _ in range(2)] == [0, 1]  # pyright: ignore[reportOptionalMemberAccess]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            feed.take(True, stop)


def test_an_error_at_the_start_is_raised_before_anything_is_taken():
    def broken() -> Iterator[InputRow]:
        raise ValueError("no rows at all")
        yield

    with pytest.raises(ValueError, match="no rows at all"):
        RowFeed(broken(), capacity=1).wait_for_first(StopRequest())


def test_a_silent_input_holds_up_neither_the_loop_nor_a_signal():
    release = threading.Event()

    def silent() -> Iterator[InputRow]:
        release.wait(30)
        yield from rows(1)

    feed, stop = RowFeed(silent(), capacity=1), StopRequest()
    assert feed.take(False, stop) is None
    stop.signum = signal.SIGINT
    for wait in (lambda: feed.take(True, stop), lambda: feed.wait_for_first(stop)):
        began = time.monotonic()
        with pytest.raises(Stopped):
            wait()
        assert time.monotonic() - began < 5
    release.set()


def test_a_second_feed_takes_from_the_first_what_is_ready():
    first = RowFeed(rows(100), capacity=30)

    def doubled() -> Iterator[int]:
        while batch := first.take_many(7):
            assert len(batch) <= 7
            yield from (2 * row.row for row in batch)

    second, stop = RowFeed(doubled(), capacity=5), StopRequest()
    taken = []
    while (row := second.take(True, stop)) is not None:
        taken.append(row)
    assert taken == [2 * number for number in range(100)]
    assert first.ended


def test_what_the_first_feeds_source_raises_comes_out_of_the_second():
    def broken() -> Iterator[InputRow]:
        yield from rows(3)
        raise OSError("the disk is gone")

    first = RowFeed(broken(), capacity=10)
    second = RowFeed((row for _ in range(9) for row in first.take_many(2)), capacity=10)
    stop = StopRequest()
    assert [second.take(True, stop).row for _ in range(3)] == [0, 1, 2]  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(OSError, match="the disk is gone"):
        second.take(True, stop)


def test_few_large_rows_are_read_ahead_however_many_may_wait():
    read = itertools.count()
    feed = RowFeed((row for row in rows(1000) if next(read) >= 0), capacity=100, weight=lambda row: MAX_WEIGHT // 3)
    feed.wait_for_first(StopRequest())
    time.sleep(0.2)
    assert next(read) <= 3 + 1 + 1
    huge = RowFeed(rows(3), capacity=100, weight=lambda row: 2 * MAX_WEIGHT)
    assert [row.row for row in (huge.take(True, StopRequest()) for _ in range(3)) if row is not None] == [0, 1, 2]


def test_a_feed_that_is_closed_takes_no_more_and_ends_who_waits_for_it():
    read = itertools.count()
    first = RowFeed((row for row in rows(1000) if next(read) >= 0), capacity=3)
    second = RowFeed((row for _ in range(999) for row in first.take_many(1)), capacity=2)
    second.wait_for_first(StopRequest())
    first.close(5)
    second.close(5)
    assert not first._thread.is_alive()
    assert not second._thread.is_alive()
    assert next(read) < 20
    assert second.take(True, StopRequest()) is None
    assert second.ended


def test_who_waits_is_called_meanwhile():
    release, calls = threading.Event(), []

    def silent() -> Iterator[InputRow]:
        release.wait(30)
        yield from rows(1)

    def waiting() -> None:
        calls.append(None)
        if len(calls) == 3:
            release.set()

    feed = RowFeed(silent(), capacity=1)
    assert feed.take(True, StopRequest(), waiting) is not None
    assert len(calls) >= 3


def test_what_is_taken_at_once_is_bounded_in_rows_and_in_memory():
    for weight, taken, read_ahead in ((0, 8, 64), (MAX_WEIGHT // 24, 3, 24), (MAX_WEIGHT // 2, 1, 2)):
        read = itertools.count()
        feed = RowFeed((row for row in rows(100) if next(read) >= 0), capacity=64, weight=lambda row, w=weight: w)
        wait_until(lambda feed=feed, most=read_ahead: len(feed._ready) == most)
        assert feed.take(True, StopRequest()) is not None
        assert len(feed._taken) == taken - 1, f"rows of {weight} bytes"
        wait_until(lambda feed=feed, most=read_ahead: len(feed._ready) == most)
        assert next(read) == taken + read_ahead + 1
        feed.close(5)
        assert feed.take(True, StopRequest()) is None, "closed"


def test_rows_and_what_the_reading_raises_keep_their_places_however_many_are_taken_at_once():
    def broken() -> Iterator[InputRow]:
        for row in rows(150):
            if row.row % 40 == 39:
                time.sleep(0.01)
            yield row
        raise OSError("the disk is gone")

    feed, stop = RowFeed(broken(), capacity=64), StopRequest()
    taken: list[int] = []
    left: set[int] = set()
    while len(taken) < 150:
        row = feed.take(len(taken) % 3 > 0, stop)
        left.add(len(feed._taken))
        taken += [row.row] if row is not None else []
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take(True, stop)
    assert taken == list(range(150))
    assert max(left) == 7


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_feed_that_is_half_full_gives_way_to_a_loop_at_work():
    read, turns = itertools.count(), Turns()
    with turns.of_loop():
        feed = RowFeed((row for row in rows(1000) if next(read) >= 0), capacity=400, turns=turns)
        feed.wait_for_first(StopRequest())
        time.sleep(0.2)
        with turns.waiting():
            pass
        num_read = next(read)
        assert 200 <= num_read < 200 + 0.5 / PATIENCE_S, "it takes a row each time that its patience ends"
        assert feed.take(True, StopRequest()) is not None
    time.sleep(0.2)
    assert next(read) > 400
    feed.close(5)


def test_a_loop_that_waits_for_rows_is_no_loop_at_work():
    """Rows that come slowly come no more slowly."""
    turns, slept = Turns(), []

    def slow() -> Iterator[InputRow]:
        for row in rows(5):
            time.sleep(0.01)
            slept.append(turns._loop_waits.is_set())
            yield row

    with turns.of_loop():
        feed = RowFeed(slow(), capacity=1, turns=turns)
        while feed.take(True, StopRequest()) is not None:
            pass
        assert not turns._loop_waits.is_set()
    assert slept.count(True) >= 4
