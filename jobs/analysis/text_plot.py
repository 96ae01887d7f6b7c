"""A line of a plot in characters."""

from collections.abc import Sequence

import numpy as np

_HEIGHTS = "▁▂▃▄▅▆▇█"


def over_time(
    starts: np.ndarray, ends: np.ndarray, values: np.ndarray, bins: int, *, whole: tuple[int, int]
) -> np.ndarray:
    """[bins] Mean over time of what has `values` from `starts` to `ends`; NaN where there is nothing.

    Intervals must not overlap one another.
    """
    edges = np.linspace(whole[0], whole[1], bins + 1)

    def until(amounts: np.ndarray) -> np.ndarray:
        """Integral up to each edge: whole intervals, and the part of the one that the edge cuts."""
        sums = np.concatenate([[0.0], np.cumsum(amounts * (ends - starts))])
        index = np.searchsorted(starts, edges, "right") - 1
        inside = np.clip(edges - starts[index], 0, (ends - starts)[index])
        return np.where(index < 0, 0.0, sums[index] + amounts[index] * inside)

    if not len(starts):
        return np.full(bins, np.nan)
    total, covered = np.diff(until(values.astype(np.float64))), np.diff(until(np.ones(len(values))))
    return np.where(covered > 0, total / np.maximum(covered, 1e-9), np.nan)


def rate_over_time(times: np.ndarray, amounts: np.ndarray, bins: int, *, whole: tuple[int, int]) -> np.ndarray:
    """[bins] Amounts for each second of the bin."""
    counts, edges = np.histogram(times, bins=bins, range=whole, weights=amounts)
    return counts / np.maximum(np.diff(edges) / 1e9, 1e-12)


def spark(values: Sequence[float] | np.ndarray, top: float) -> str:
    """One character a value, between 0 and `top`; a space where the value is NaN."""
    if top <= 0:
        return " " * len(values)
    return "".join(
        " " if value != value else _HEIGHTS[min(int(value / top * len(_HEIGHTS)), len(_HEIGHTS) - 1)]
        for value in values
    )


def bar(share: float, width: int) -> str:
    """A bar of eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
