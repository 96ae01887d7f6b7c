import pytest

from jobs.ration import MIN_ROWS, STEPS, Ration


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1000 * STEPS), (10_000, MIN_ROWS), (0, None)])
def test_a_ration_is_two_steps_of_tokens_and_at_least_so_many_rows(num_tokens: int, expected: int | None) -> None:
    ration = Ration(1000)
    rows = 0
    while not ration.is_spent and rows < 100_000:
        ration.take(num_tokens)
        rows += 1
    assert rows == (expected or 100_000)
