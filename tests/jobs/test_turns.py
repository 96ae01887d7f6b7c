"""Turns at the interpreter beside the step loop."""

import sys

import pytest

from jobs.turns import TURN_S, short_turns


def test_turns_are_short_inside_and_as_before_afterwards():
    before = sys.getswitchinterval()

    with pytest.raises(RuntimeError, match="inside"), short_turns():
        assert sys.getswitchinterval() == pytest.approx(TURN_S)
        raise RuntimeError("inside")

    assert sys.getswitchinterval() == before != pytest.approx(TURN_S)
