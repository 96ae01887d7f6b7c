"""The arithmetic of a trace, and what says that there can be none."""

import random

import pytest

from jobs.bench_trace import TOKENS_COPY, behind_ramp, by_kernel, occupancy


def test_busy_time_is_counted_once_where_kernels_overlap() -> None:
    seen = occupancy([(0.0, 5.0), (3.0, 8.0), (10.0, 12.0), (40.0, 41.0), (4.0, 5.0)])
    assert (seen.span, seen.busy, seen.short_gaps, seen.long_gaps) == (41.0, 11.0, 2.0, 28.0)


@pytest.mark.parametrize("seed", range(20))
def test_span_is_busy_time_and_gaps(seed: int) -> None:
    rng = random.Random(seed)
    starts = [rng.uniform(0, 1000) for _ in range(50)]
    intervals = [(start, start + rng.uniform(0, 30)) for start in starts]
    seen = occupancy(intervals)
    assert seen.span == pytest.approx(seen.busy + seen.long_gaps + seen.short_gaps)
    points = [seen.span * i / 20_000 + min(starts) for i in range(20_000)]
    covered = sum(any(a <= p < b for a, b in intervals) for p in points) / len(points)
    assert seen.busy / seen.span == pytest.approx(covered, abs=0.01)


def test_what_comes_before_the_device_is_in_full_swing_does_not_count() -> None:
    steps = [
        [("kernel", at, at + 8.0), (f"{TOKENS_COPY} (Device -> Pinned)", at + 8, at + 9)] for at in (0, 100, 110, 120)
    ]
    kernels = [kernel for step in steps for kernel in step]

    assert behind_ramp(reversed(kernels), 1, 3) == kernels[1:6]
    assert behind_ramp(kernels, 2, 4) == kernels[3:]
    assert occupancy((start, end) for _, start, end in behind_ramp(kernels, 2, 4)).long_gaps == 0


def test_kernels_are_summed_by_name_longest_first() -> None:
    totals = by_kernel([("a", 0, 1), ("b", 1, 5), ("a", 5, 7)])
    assert list(totals.items()) == [("b", (1, 4)), ("a", (2, 3))]
