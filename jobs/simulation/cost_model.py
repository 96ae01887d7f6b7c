"""What steps cost, fitted on the steps of a recorded run."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from jobs.simulation.fitting import Error, Fit, fit, held_out_error
from jobs.simulation.forward_cost import DOUBTED, FEATURES, WHOLE, ForwardFeatures, SharedReads
from jobs.simulation.host_times import HostTimes
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.step_sizes import Padding, StepSizes, recorded_halves, recorded_sizes

WARM_UP_STEPS = 16
SETTLING_MS = 100.0
"""An H200 multiplies 8 to 10 % faster for the first 40 to 60 ms (kernels/NOTES.md)."""
LEAST_PREFILLS = 8
SUBMIT = ("step", "row", "prefill token", "prefill row")
POSTPROCESS = ("step", "row", "step with finished rows", "finished row")
BETWEEN = ("step", "step with finished rows", "finished row", "new prompt token")
ROW_IN_TOKENS = 256
"""What a new row costs the host beside its prompt, as so many tokens of it: a run takes in too few times to tell."""
FEW_END = MappingProxyType({"finished row": 1.0})
"""Doubted, with its weight: mostly one row ends with a step, so that a run hardly tells what a second one costs and not
at all what a hundred do (in `nano` each seems to take 50 us to commit and 60 beside it; 120 that end together take 17
and 35)."""
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
        submit = _submit(sizes)
        host = self.schedule.predict_one(*submit) + self.prepare.predict_one(*submit)
        return host, forward, self.gap.predict_one(*_gap(sizes))

    def gap_ms(self, sizes: StepSizes) -> np.ndarray:
        return self.gap.predict(_gap(sizes))

    def submit_ms(self, sizes: StepSizes) -> np.ndarray:
        """To schedule and prepare."""
        return self.schedule.predict(_submit(sizes)) + self.prepare.predict(_submit(sizes))

    def after_ms(self, num_rows: np.ndarray) -> np.ndarray:
        """To commit a step in which no row ends, and until the next one is scheduled; rows taken in are left out."""
        return self.postprocess.predict((1.0, num_rows, 0.0, 0.0)) + self.between.predict((1.0, 0.0, 0.0, 0.0))

    def ending_ms(self, num_finished: int) -> float:
        """What rows that end with a step add to that."""
        postprocess = self.postprocess.predict_one(0.0, 0.0, 1.0, num_finished)
        return postprocess + self.between.predict_one(0.0, 1.0, num_finished, 0.0)

    def intake_ms(self, num_rows: int, num_tokens: int) -> float:
        """To take rows in."""
        return self.between.predict_one(0.0, 0.0, 0.0, _intake(num_rows, num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCosts:
    """A cost model and how good it is."""

    model: CostModel
    num_steps: int
    error: Error
    """Of the forward time, on steps that the fit had not seen."""
    num_outliers: int
    num_late_captures: int
    num_other_padding: int
    """Steps whose recorded padding is not what this version would choose."""


def fit_costs(run: RecordedRun, shared: SharedReads) -> FittedCosts:
    """`shared` is what shared prefixes changed in each recorded step."""
    sizes, times = recorded_sizes(run), HostTimes(run)
    padding, features = Padding.of(run.facts, run.facts.settings), ForwardFeatures.of(run.facts)
    in_halves = recorded_halves(run, padding.in_halves(sizes, shared.saved))
    columns = features.columns(sizes, padding, shared, in_halves)
    settled = _settled(run, sizes, times)
    columns = [np.broadcast_to(np.asarray(column), len(settled))[settled] for column in columns]
    forward = fit(FEATURES, columns, times.forward[settled], doubted=DOUBTED)
    warm_up = max(WARM_UP_STEPS - int(np.count_nonzero(~settled)), 0)
    is_first = _captured_late(sizes, padding)
    others = ~is_first
    submit = _submit(sizes)
    schedule = fit(SUBMIT, submit, times.schedule)
    prepare = fit(SUBMIT, [np.broadcast_to(np.asarray(c), len(others))[others] for c in submit], times.prepare[others])
    captures = times.late_captures(is_first, prepare.predict(submit))
    capture_ms = float(np.median(captures)) if len(captures) else 0.0  # the first one may compile kernels too
    gaps, between = times.device_gaps(), times.between_steps()
    finished = run.column("num_finished")
    model = CostModel(
        features=features,
        forward=forward,
        gap=_fit_or_zero(GAP, _gap(StepSizes(*(np.asarray(values)[gaps.step] for values in sizes))), gaps.ms),
        schedule=schedule,
        prepare=prepare,
        postprocess=fit(POSTPROCESS, (1.0, sizes.num_rows, finished > 0, finished), times.postprocess, doubted=FEW_END),
        between=_fit_or_zero(
            BETWEEN,
            (1.0, between.num_finished > 0, between.num_finished, _intake(between.rows_in, between.tokens_in)),
            between.ms,
            between.rows_in > 0,
            FEW_END,
        ),
        capture_ms=capture_ms,
        warm_up_ms=_warm_up(forward, warm_up)
        + _warm_up(schedule, WARM_UP_STEPS)
        + max(0.0, float((captures - capture_ms).sum())),
    )
    return FittedCosts(
        model=model,
        num_steps=len(times.forward),
        error=held_out_error(FEATURES, columns, times.forward[settled], num_warm_up=warm_up, doubted=DOUBTED),
        num_outliers=int(forward.outliers.sum()),
        num_late_captures=int(is_first.sum()),
        num_other_padding=_other_padding(run, sizes, padding),
    )


def _submit(sizes: StepSizes) -> tuple[Any, ...]:
    return 1.0, sizes.num_rows, sizes.num_prefill_tokens, sizes.num_rows - sizes.num_decodes


def _intake(num_rows: Any, num_tokens: Any) -> Any:
    return num_tokens + ROW_IN_TOKENS * num_rows


def _gap(sizes: StepSizes) -> tuple[Any, ...]:
    return 1.0, sizes.num_decodes < sizes.num_rows


def _fit_or_zero(
    names: tuple[str, ...],
    features: tuple[object, ...],
    values: np.ndarray,
    never_outliers: np.ndarray | None = None,
    doubted: Mapping[str, float] = MappingProxyType({}),
) -> Fit:
    """A run of one step has no gap between steps."""
    if len(values):
        return fit(names, features, values, doubted=doubted, never_outliers=never_outliers)
    nothing = np.zeros(0)
    return Fit(names=names, coefficients=np.zeros(len(names)), outliers=nothing > 0, residuals=nothing)


def _settled(run: RecordedRun, sizes: StepSizes, times: HostTimes) -> np.ndarray:
    """bool [steps]: without those of a GPU's first moments, while its clock is not yet held down by the power it may
    draw; all where too few steps with prefills would be left, which show most of that."""
    settled = ~np.logical_and(run.facts.on_gpu, times.end < times.start[0] + SETTLING_MS)
    is_kept = np.count_nonzero((sizes.num_decodes < sizes.num_rows)[settled]) >= LEAST_PREFILLS
    return settled if is_kept else np.ones_like(settled)


def _warm_up(cost: Fit, num_steps: int) -> float:
    """What outliers among the first steps took too much."""
    first = slice(0, num_steps)
    return max(0.0, float(cost.residuals[first][cost.outliers[first]].sum()))


def _captured_late(sizes: StepSizes, padding: Padding) -> np.ndarray:
    """bool [steps]: whether the step's graph had to be captured first."""
    tokens, sampled = padding.padded(sizes)
    found = np.zeros(len(tokens), np.bool_)
    seen: set[tuple[int, int]] = set()
    for place in np.flatnonzero(sizes.num_decodes < sizes.num_rows).tolist():
        shape = int(tokens[place]), int(sampled[place])
        if shape not in seen and padding.is_captured_late(*shape):
            found[place] = True
        seen.add(shape)
    return found


def _other_padding(run: RecordedRun, sizes: StepSizes, padding: Padding) -> int:
    recorded = run.column("padded_num_tokens")
    graphs = run.column("cuda_graph")
    return int(np.count_nonzero((padding.padded(sizes)[0] != recorded) & graphs))
