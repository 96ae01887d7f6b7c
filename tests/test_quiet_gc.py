import gc
import weakref

import pytest

from nanovllm.quiet_gc import INTERVAL_S, collector_kept_out


class Node:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_but_between_steps_once_in_a_while() -> None:
    now = 0.0
    with collector_kept_out(lambda: now) as between_steps:
        assert not gc.isenabled()
        garbage = weakref.ref(Node())
        between_steps()
        assert garbage() is not None
        now = INTERVAL_S
        between_steps()
        assert garbage() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_collector_comes_back_when_the_loop_fails() -> None:
    with pytest.raises(RuntimeError), collector_kept_out():
        raise RuntimeError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_kept_out():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
