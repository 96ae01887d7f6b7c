"""What the steps of a recorded run cost, by its records."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from jobs.simulation.cost_model import (
    BETWEEN,
    GAP,
    POSTPROCESS,
    SUBMIT,
    CostModel,
    gap_features,
    intake_tokens,
    submit_features,
)
from jobs.simulation.fitting import Error, Fit, Fitted, fit, held_out_error
from jobs.simulation.forward_cost import DOUBTED, FEATURES, ForwardFeatures, SharedReads
from jobs.simulation.host_times import HostTimes
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.recorded_steps import recorded_halves, recorded_sizes
from jobs.simulation.step_sizes import Padding, StepSizes

WARM_UP_STEPS = 16
SETTLING_MS = 100.0
"""An H200 multiplies 8 to 10 % faster for the first 40 to 60 ms (kernels/NOTES.md)."""
LEAST_PREFILLS = 8
FEW_END = 3
"""That so many rows which end with a step cost nothing is taken for one more value: a run in which mostly one does
hardly tells what a second one costs, and not at all what a hundred do (in `nano` each seems to take 50 us to commit and
60 beside it; 120 that end together take 17 and 35). Beside steps in which many end it does not count."""


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
    submit = submit_features(sizes)
    schedule = fit(SUBMIT, submit, times.schedule)
    prepare = fit(SUBMIT, [np.broadcast_to(np.asarray(c), len(others))[others] for c in submit], times.prepare[others])
    captures = times.late_captures(is_first, prepare.fit.predict(submit))
    capture_ms = float(np.median(captures)) if len(captures) else 0.0  # the first one may compile kernels too
    gaps, between = times.device_gaps(), times.between_steps()
    finished = run.column("num_finished")
    model = CostModel(
        features=features,
        forward=forward.fit,
        gap=_fit_or_zero(GAP, gap_features(StepSizes(*(np.asarray(values)[gaps.step] for values in sizes))), gaps.ms),
        schedule=schedule.fit,
        prepare=prepare.fit,
        postprocess=fit(
            POSTPROCESS, (1.0, sizes.num_rows, finished > 0, finished), times.postprocess, doubted=_ends(finished)
        ).fit,
        between=_fit_or_zero(
            BETWEEN,
            (1.0, between.num_finished > 0, between.num_finished, intake_tokens(between.rows_in, between.tokens_in)),
            between.ms,
            between.rows_in > 0,
            _ends(between.num_finished),
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


def _ends(finished: np.ndarray) -> Mapping[str, float]:
    """How much of what many rows that end together seem to cost is doubted: nothing to speak of where many did."""
    return {"finished row": (FEW_END / max(int(finished.max(initial=0)), FEW_END)) ** 2}


def _fit_or_zero(
    names: tuple[str, ...],
    features: tuple[object, ...],
    values: np.ndarray,
    never_outliers: np.ndarray | None = None,
    doubted: Mapping[str, float] = MappingProxyType({}),
) -> Fit:
    """A run of one step has no gap between steps."""
    if len(values):
        return fit(names, features, values, doubted=doubted, never_outliers=never_outliers).fit
    return Fit(names=names, coefficients=np.zeros(len(names)))


def _settled(run: RecordedRun, sizes: StepSizes, times: HostTimes) -> np.ndarray:
    """bool [steps]: without those of a GPU's first moments, while its clock is not yet held down by the power it may
    draw; all where too few steps with prefills would be left, which show most of that."""
    settled = ~np.logical_and(run.facts.on_gpu, times.end < times.start[0] + SETTLING_MS)
    is_kept = np.count_nonzero((sizes.num_decodes < sizes.num_rows)[settled]) >= LEAST_PREFILLS
    return settled if is_kept else np.ones_like(settled)


def _warm_up(cost: Fitted, num_steps: int) -> float:
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
