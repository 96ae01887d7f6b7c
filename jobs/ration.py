"""How many rows are taken in between two steps."""

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
