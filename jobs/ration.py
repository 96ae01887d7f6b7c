"""How many rows are taken in between two steps."""

from collections.abc import Callable

from nanovllm.engine.llm_engine import LLMEngine

MIN_ROWS = 128
"""Many rows may fit into a step whose prompts are short or come from the prefix cache."""
STEPS = 2


class Ration:
    """Enough rows for the next steps, and no more: a device must not wait while a whole queue is tokenised."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._num_tokens_left = STEPS * max_num_batched_tokens
        self._num_rows_left = MIN_ROWS

    @property
    def is_spent(self) -> bool:
        return self._num_rows_left <= 0 and self._num_tokens_left <= 0

    def take(self, num_tokens: int) -> None:
        """A row of that many tokens has been taken in."""
        self._num_rows_left -= 1
        self._num_tokens_left -= num_tokens


def take_rows(engine: LLMEngine, take: Callable[[], int | None]) -> None:
    """Take rows in while few wait for the engine, a ration at a time.

    `take` hands the next row to the engine and returns the tokens of its prompt, 0 for a row that failed, None where
    there is no row now.
    """
    ration = Ration(engine.scheduler.max_num_batched_tokens)
    while engine.num_waiting < engine.scheduler.max_num_seqs and not ration.is_spent:
        num_tokens = take()
        if num_tokens is None:
            return
        ration.take(num_tokens)
