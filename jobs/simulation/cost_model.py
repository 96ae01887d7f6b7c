"""What steps cost: features and coefficients."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.simulation.fitting import Fit
from jobs.simulation.forward_cost import FEATURES, WHOLE, ForwardFeatures, SharedReads
from jobs.simulation.step_sizes import Padding, StepSizes

SUBMIT = ("step", "row", "prefill token", "prefill row")
POSTPROCESS = ("step", "row", "step with finished rows", "finished row")
BETWEEN = ("step", "step with finished rows", "finished row", "new prompt token")
ROW_IN_TOKENS = 256
"""What a new row costs the host beside its prompt, as so many tokens of it: a run takes in too few times to tell."""
GAP = ("step", "step with prefills")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Milliseconds. Host and device are apart: they work side by side where the runner looks ahead."""

    features: ForwardFeatures
    forward: Fit
    gap: Fit
    """Between a step's possible beginning on the device and its result on the host, beside the forward time."""
    schedule: Fit
    prepare: Fit
    postprocess: Fit
    between: Fit
    """From one step's commit to the next one's scheduling."""
    capture_ms: float
    """Of the graph of a step with prefills whose shape comes for the first time."""
    warm_up_ms: float
    """What the first steps took longer than others like them, in all."""

    @property
    def whole_ms(self) -> float:
        """What a step takes longer for not being in halves."""
        return self.forward.coefficients.item(FEATURES.index(WHOLE))

    def forward_ms(self, sizes: StepSizes, padding: Padding, shared: SharedReads) -> np.ndarray:
        """Of steps whose sizes are arrays."""
        in_halves = padding.in_halves(sizes, shared.saved)
        return self.forward.predict(self.features.columns(sizes, padding, shared, in_halves))

    def of_step(self, sizes: StepSizes, padding: Padding, shared: SharedReads) -> tuple[float, float, float]:
        """(submit, forward, gap) of one step, whose sizes are ints: a fifth of the time that arrays take."""
        in_halves = padding.in_halves(sizes, shared.saved)
        forward = self.forward.predict_one(*self.features.columns(sizes, padding, shared, in_halves))
        submit = submit_features(sizes)
        host = self.schedule.predict_one(*submit) + self.prepare.predict_one(*submit)
        return host, forward, self.gap.predict_one(*gap_features(sizes))

    def gap_ms(self, sizes: StepSizes) -> np.ndarray:
        return self.gap.predict(gap_features(sizes))

    def submit_ms(self, sizes: StepSizes) -> np.ndarray:
        """To schedule and prepare."""
        return self.schedule.predict(submit_features(sizes)) + self.prepare.predict(submit_features(sizes))

    def after_ms(self, num_rows: np.ndarray) -> np.ndarray:
        """To commit a step in which no row ends, and until the next one is scheduled; rows taken in are left out."""
        return self.postprocess.predict((1.0, num_rows, 0.0, 0.0)) + self.between.predict((1.0, 0.0, 0.0, 0.0))

    def ending_ms(self, num_finished: int) -> float:
        """What rows that end with a step add to that."""
        postprocess = self.postprocess.predict_one(0.0, 0.0, 1.0, num_finished)
        return postprocess + self.between.predict_one(0.0, 1.0, num_finished, 0.0)

    def intake_ms(self, num_rows: int, num_tokens: int) -> float:
        """To take rows in."""
        return self.between.predict_one(0.0, 0.0, 0.0, intake_tokens(num_rows, num_tokens))


def submit_features(sizes: StepSizes) -> tuple[Any, ...]:
    """SUBMIT of a step, or of steps."""
    return 1.0, sizes.num_rows, sizes.num_prefill_tokens, sizes.num_rows - sizes.num_decodes


def intake_tokens(num_rows: Any, num_tokens: Any) -> Any:
    """The last of BETWEEN, where rows are taken in."""
    return num_tokens + ROW_IN_TOKENS * num_rows


def gap_features(sizes: StepSizes) -> tuple[Any, ...]:
    """GAP of a step, or of steps."""
    return 1.0, sizes.num_decodes < sizes.num_rows
