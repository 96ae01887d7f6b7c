"""Turns at the interpreter beside the step loop."""

import sys

import pytest

from jobs.turns import TURN_S, short_turns


def test_turns_are_short_inside_and_as_before_afterwards():
    before, inside = sys.getswitchinterval(), []

    def fail() -> None:
        with short_turns():
            inside.append(sys.getswitchinterval())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()

    assert inside == [pytest.approx(TURN_S)]
    assert sys.getswitchinterval() == before != pytest.approx(TURN_S)
