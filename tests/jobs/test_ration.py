from types import SimpleNamespace
from typing import cast

import pytest

from jobs.ration import MIN_ROWS, STEPS, take_rows
from nanovllm.engine.llm_engine import LLMEngine


class Queue:
    """Stands in for an engine, and for rows of `num_tokens` each, that there are `num_rows` of."""

    def __init__(self, num_tokens: int, num_rows: int, max_num_seqs: int = 100_000) -> None:
        self.num_tokens, self.num_rows = num_tokens, num_rows
        self.scheduler = SimpleNamespace(max_num_batched_tokens=1000, max_num_seqs=max_num_seqs, num_waiting=0)

    def take(self) -> int | None:
        if self.scheduler.num_waiting == self.num_rows:
            return None
        self.scheduler.num_waiting += 1
        return self.num_tokens

    def taken(self) -> int:
        take_rows(cast(LLMEngine, self), self.take)
        return self.scheduler.num_waiting


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1000 * STEPS), (10_000, MIN_ROWS), (0, 5000)])
def test_a_ration_is_two_steps_of_tokens_and_at_least_so_many_rows(num_tokens: int, expected: int) -> None:
    assert Queue(num_tokens, num_rows=5000).taken() == expected


def test_no_more_are_taken_than_may_wait_or_than_there_are() -> None:
    assert Queue(1, num_rows=5000, max_num_seqs=7).taken() == 7
    assert Queue(1, num_rows=5).taken() == 5
