"""How many rows are taken in between two steps."""

from collections.abc import Callable

from nanovllm.engine.llm_engine import LLMEngine

MIN_ROWS = 128
"""Many rows may fit into a step whose prompts are short or come from the prefix cache."""
STEPS = 2


def take_rows(engine: LLMEngine, take: Callable[[], int | None]) -> None:
    """Take rows in while few wait for the engine: enough for the next steps, and no more.

    A device must not wait while a whole queue is tokenised. `take` hands the next row to the engine and returns the
    tokens of its prompt, 0 for a row that failed, None where there is no row now.
    """
    scheduler = engine.scheduler
    num_rows_left, num_tokens_left = MIN_ROWS, STEPS * scheduler.max_num_batched_tokens
    while (num_rows_left > 0 or num_tokens_left > 0) and scheduler.num_waiting < scheduler.max_num_seqs:
        num_tokens = take()
        if num_tokens is None:
            return
        num_rows_left -= 1
        num_tokens_left -= num_tokens
