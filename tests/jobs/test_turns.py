"""Turns at the interpreter beside the step loop."""

import sys
import threading
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from jobs.launch import launch
from jobs.turns import TURN_S, GivingWay, Turns, short_turns
from nanovllm.engine.plan import Plan, StepResult
from tests.jobs.scripted_job import SCRIPTED, _Runner, words, write_input


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


def test_who_gives_way_goes_on_while_the_loop_waits_and_after_a_while_anyway(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.turns.PATIENCE_S", 0.2)
    turns = Turns()

    def took() -> float:
        began = time.monotonic()
        turns.give_way()
        return time.monotonic() - began

    assert took() < 0.1
    with turns.of_loop():
        assert took() >= 0.2
        with turns.waiting():
            assert took() < 0.1
            with turns.waiting():
                pass
            assert took() < 0.1
        assert took() >= 0.2
    with pytest.raises(RuntimeError), turns.of_loop():
        raise RuntimeError
    assert took() < 0.1


class Watched:
    """A runner that notes whether the loop is said to wait."""

    def __init__(self, lookahead: int, turns: Turns) -> None:
        self.lookahead = lookahead
        self.seen: list[tuple[str, bool]] = []
        self._turns = turns

    def submit(self, plan: Plan) -> None:
        self.seen.append(("submit", self._turns._loop_waits.is_set()))

    def collect(self) -> StepResult:
        self.seen.append(("collect", self._turns._loop_waits.is_set()))
        return StepResult(token_ids=np.empty(0, np.int32))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_loop_waits_where_the_device_works(lookahead: int):
    turns = Turns()
    watched = Watched(lookahead, turns)
    runner = GivingWay(watched, turns)
    assert runner.lookahead == lookahead
    with turns.of_loop():
        runner.submit(cast(Plan, None))
        runner.collect()
        assert not turns._loop_waits.is_set()
    assert watched.seen == [("submit", lookahead == 0), ("collect", True)]


def test_in_a_job_the_feeds_give_way_to_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "rows.jsonl", 60)
    seen: list[tuple[str, bool]] = []
    collect, give_way = _Runner.collect, Turns.give_way
    loops: list[Turns] = []

    def watched_collect(self: _Runner) -> StepResult:
        seen.append(("collect", loops[0]._loop_waits.is_set()))
        return collect(self)

    def watched_give_way(self: Turns) -> None:
        loops.append(self)
        seen.append(("row", threading.current_thread() is not threading.main_thread()))
        give_way(self)

    def watched_submit(self: _Runner, plan: Plan) -> None:
        seen.append(("submit", loops[0]._loop_waits.is_set()))
        submit(self, plan)

    submit = _Runner.submit
    monkeypatch.setattr(_Runner, "collect", watched_collect)
    monkeypatch.setattr(_Runner, "submit", watched_submit)
    monkeypatch.setattr(Turns, "give_way", watched_give_way)

    assert launch(SCRIPTED, [*words(Path("rows.jsonl")), "hydra.run.dir=run"]) == 3

    assert set(seen) == {("row", True), ("submit", False), ("collect", True)}
    assert len(set(loops)) == 1
    assert loops[0]._loop_waits.is_set(), "the loop is over"
