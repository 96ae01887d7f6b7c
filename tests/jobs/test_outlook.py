"""The time left, held against jobs that are played through to their end."""

import random

import numpy as np
import pytest

from jobs.outlook import Outlook

MAX_TOKENS = 4096
BATCH = 64
STEP_S = 0.01


class PlayedJob:
    """Rows of known lengths through a batch of BATCH, a token a step for each."""

    def __init__(self, lengths: list[int]) -> None:
        self.waiting = list(reversed(lengths))
        self.running: list[list[int]] = []  # [tokens so far, length]
        self.outlook = Outlook(MAX_TOKENS)
        self.num_steps = self.num_tokens = self.num_done = 0
        self.marks: list[tuple[int, int, int]] = []

    def step(self) -> bool:
        while self.waiting and len(self.running) < BATCH:
            self.running.append([0, self.waiting.pop()])
        self.num_steps += 1
        self.num_tokens += len(self.running)
        for row in self.running:
            row[0] += 1
            if row[0] == row[1]:
                self.outlook.finished(row[1])
                self.num_done += 1
        self.running = [row for row in self.running if row[0] < row[1]]
        self.marks.append((self.num_steps, self.num_tokens, self.num_done))
        return bool(self.waiting or self.running)

    def tokens_per_s(self) -> float:
        window = self.marks[-500:]
        return (window[-1][1] - window[0][1]) / ((len(window) - 1) * STEP_S)

    def rows_per_s(self) -> float:
        window = self.marks[-500:]
        return (window[-1][2] - window[0][2]) / ((len(window) - 1) * STEP_S)

    def seconds_left(self) -> float | None:
        return self.outlook.seconds_left(
            len(self.waiting),
            np.array([row[0] for row in self.running]),
            tokens_per_s=self.tokens_per_s(),
            steps_per_s=1 / STEP_S,
        )


def long_tailed(count: int) -> list[int]:
    rng = random.Random(1)
    return [min(MAX_TOKENS, int(rng.lognormvariate(4.5, 1.1)) + 1) for _ in range(count)]


def estimates(lengths: list[int], every: int = 200) -> list[tuple[float, float, float]]:
    """(share of the time that is over, seconds left as estimated, and as by rows a second)."""
    job, seen = PlayedJob(lengths), []
    while job.step():
        left_s = job.seconds_left() if job.num_steps % every == 0 else None
        if left_s is not None:
            rows_left = len(job.waiting) + len(job.running)
            seen.append((job.num_steps, left_s, rows_left / max(job.rows_per_s(), 1e-9)))
    return [(step / job.num_steps, left_s, naive_s, (job.num_steps - step) * STEP_S) for step, left_s, naive_s in seen]  # pyright: ignore[reportReturnType]


def errors(seen: list, which: int, begin: float, end: float) -> float:
    """The mean relative error of the whole time, as it would be told, between two shares of it."""
    told = [abs(row[which] - row[3]) / (row[3] / (1 - row[0])) for row in seen if begin <= row[0] < end]
    assert len(told) >= 2, "the job is too short for this"
    return sum(told) / len(told)


def test_the_time_left_is_right_within_a_fifth_from_an_early_time_on() -> None:
    seen = estimates(long_tailed(2000))
    assert errors(seen, 1, 0.2, 0.6) < 0.2
    assert errors(seen, 1, 0.6, 1.0) < 0.2


def test_it_knows_the_tail_that_rows_a_second_do_not() -> None:
    """A job whose last batch takes half of its time: by rows a second it is always almost done."""
    seen = estimates(long_tailed(400), every=50)
    assert errors(seen, 1, 0.2, 0.5) < 0.5 * errors(seen, 2, 0.2, 0.5)


def test_short_answers_that_finish_first_do_not_make_the_others_short() -> None:
    outlook = Outlook(MAX_TOKENS)
    for _ in range(20):
        outlook.finished(10)
    told_s = outlook.seconds_left(0, np.full(80, 200), tokens_per_s=100.0, steps_per_s=10.0)
    assert told_s is not None
    begun_s = outlook.seconds_left(100, np.full(80, 200), tokens_per_s=100.0, steps_per_s=10.0)
    assert begun_s is not None
    assert begun_s - told_s == pytest.approx(100 * (0.2 * 10 + 0.8 * 200) / 100.0, rel=0.02)


def test_equal_answers_end_together() -> None:
    outlook = Outlook(MAX_TOKENS)
    outlook.finished(300)
    assert outlook.seconds_left(0, np.array([100] * 8), tokens_per_s=80.0, steps_per_s=10.0) == pytest.approx(
        20, abs=0.2
    )


def test_nothing_is_told_before_anything_is_known_and_nothing_is_left_at_the_end() -> None:
    outlook = Outlook(MAX_TOKENS)
    assert outlook.seconds_left(5, np.array([3, 4]), tokens_per_s=10.0, steps_per_s=5.0) is None
    outlook.finished(3)
    assert outlook.seconds_left(5, np.array([3, 4]), tokens_per_s=0.0, steps_per_s=5.0) is None
    assert outlook.seconds_left(0, np.array([], np.int64), tokens_per_s=10.0, steps_per_s=5.0) == 0.0
    outlook.finished(MAX_TOKENS + 7)
    assert outlook.seconds_left(1, np.array([MAX_TOKENS]), tokens_per_s=10.0, steps_per_s=5.0) is not None
