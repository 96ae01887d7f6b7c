"""How long a job still takes, from how long its answers have been so far."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine


class Outlook:
    """The lengths of the answers that are finished and of those that are being written.

    The chance that an answer goes on after n tokens comes from both (Kaplan and Meier's estimate): finished ones alone
    would be too short, as short ones finish first. So the time left is that of the rows which have not begun, at the
    present rate, and after them the tail: the steps in which a batch like the present one empties.
    """

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: no answer is longer."""
        self._ended = np.zeros(max_tokens + 1, np.int64)

    def finished(self, num_output_tokens: int) -> None:
        self._ended[min(num_output_tokens, len(self._ended) - 1)] += 1

    def seconds_left(
        self, num_not_begun: int, lengths: np.ndarray, *, tokens_per_s: float, steps_per_s: float
    ) -> float | None:
        """`lengths` are the running answers' so far, in tokens; None while no answer has been finished."""
        if num_not_begun == 0 and len(lengths) == 0:
            return 0.0
        if not self._ended.any() or tokens_per_s <= 0 or steps_per_s <= 0:
            return None
        survival = self._survival(lengths)
        tail_s = self._tail_steps(survival, lengths) / steps_per_s
        return num_not_begun * float(survival.sum()) / tokens_per_s + tail_s

    def _survival(self, lengths: np.ndarray) -> np.ndarray:
        """float64: how likely an answer has more than n tokens, for n from 0; 0 from the longest known one on."""
        most = int(max(self._ended.nonzero()[0][-1], lengths.max(initial=0)))
        ended = self._ended[: most + 1]
        running = np.bincount(np.minimum(lengths, most), minlength=most + 1)
        at_risk = np.cumsum((ended + running)[::-1])[::-1]  # of n tokens or more
        ends = np.divide(ended, at_risk, out=np.zeros(most + 1), where=at_risk > 0)
        survival = np.cumprod(1.0 - ends)
        survival[-1] = 0.0
        return survival

    def _tail_steps(self, survival: np.ndarray, lengths: np.ndarray) -> int:
        """Steps until, more likely than not, the last of the running answers has ended."""
        last = len(survival) - 1
        begun = survival[np.minimum(lengths, last)]
        open_ended = begun > 0
        ages, begun = lengths[open_ended], begun[open_ended]
        low, high = 0, last + 1
        while len(ages) and high - low > 1:
            steps = (low + high) // 2
            still = survival[np.minimum(ages + steps, last)] / begun
            if 1.0 - np.prod(1.0 - still) >= 0.5:
                low = steps
            else:
                high = steps
        return high if len(ages) else 1


def running_lengths(engine: "LLMEngine") -> np.ndarray:
    """int64: how many tokens each running answer has."""
    running = engine.scheduler.running
    slots = running.order[~running.ended[running.order]].tolist()
    return np.array([running.committed.item(s) - running.sequence_in(s).num_prompt_tokens for s in slots], np.int64)
