"""A runner that raises: the error comes through, nothing is lost in the books, and the engine does not go on."""

from typing import Any

import numpy as np
import pytest

from tests.engine.build import add, build_engine, drain


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("method", ["submit", "collect"])
@pytest.mark.parametrize("failing_call", [1, 2, 5])
def test_every_block_comes_back_and_every_request_is_accounted_for(
    lookahead: int, method: str, failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, log = build_engine(lookahead=lookahead)
    whole, num_calls = getattr(engine.runner, method), 0

    def failing(*arguments: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing_call:
            raise MemoryError("the device is out of memory")
        return whole(*arguments)

    monkeypatch.setattr(engine.runner, method, failing)
    for row, max_tokens in enumerate((2, 9, 20)):
        add(engine, list(range(3 + row)), max_tokens, row)
    with pytest.raises(MemoryError, match="out of memory"):
        drain(engine)
    engine.abort_all()

    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    blocks.check_integrity([])
    assert sorted(event.seq_id for event in log.requests) == [0, 1, 2]
    assert log.block_events[-1].free_blocks == blocks.num_blocks
    with pytest.raises(RuntimeError, match=r"failed in an earlier step.*out of memory"):
        engine.step()


@pytest.mark.parametrize("failing_call", [1, 2, 3])
@pytest.mark.parametrize("shares", [False, True])
def test_an_interrupt_while_rows_are_admitted_leaves_no_block_behind(
    failing_call: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, log = build_engine(lookahead=1)
    blocks = engine.scheduler.blocks
    whole, num_calls = blocks.find_prefix, 0

    def interrupted(*arguments: Any) -> np.ndarray:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing_call:
            raise KeyboardInterrupt
        return whole(*arguments)

    prompt = list(range(12))
    add(engine, prompt, 2, 0)
    drain(engine)
    monkeypatch.setattr(blocks, "find_prefix", interrupted)
    for row in (1, 2, 3):
        add(engine, prompt if shares else [20 + row] * 12, 4, row)
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    ended = engine.abort_all()

    assert blocks.num_free == blocks.num_blocks
    blocks.check_integrity([])
    assert sorted(output.row for output in ended) == [1, 2, 3]
    assert log.block_events[-1].free_blocks == blocks.num_blocks
    with pytest.raises(RuntimeError, match=r"failed in an earlier step.*build a new one"):
        engine.step()
