"""A recorded run, the costs fitted on it, and what it would have been otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.cost_fitting import FittedCosts, fit_costs
from jobs.simulation.event_comparison import first_difference, recorded_columns
from jobs.simulation.forward_cost import SharedReads
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_rows import RecordedRows
from jobs.simulation.recorded_run import PHASES_OUTSIDE, RecordedRun
from jobs.simulation.settings import Settings
from jobs.simulation.simulator import Outcome, simulate
from jobs.simulation.subject import Subject
from jobs.simulation.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of a whole job."""

    outcome: Outcome
    steps_s: float
    """From the first step's start to the last one's end, as a run's figures have it."""
    job_s: float
    """All phases: loading, capturing, generating, writing."""
    latencies_s: np.ndarray
    """[rows that ended] from a row's arrival in the engine to its end."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.outcome.num_output_tokens / self.steps_s if self.steps_s else 0.0


class Predictor:
    """Costs come from `run`; rows and settings may be another run's, on the same device with the same model."""

    def __init__(self, run: RecordedRun) -> None:
        self.run = run
        self.read = read_rows(run)
        self.rows = self.read.rows
        self.costs = self._fit()
        self.ledger = BlockLedger()
        """Of the run itself, simulated with its own settings, as is `own`."""
        self.own = simulate(run.facts, self.rows, self.costs.model, run.facts.settings, ledger=self.ledger)
        self.calibration = self._calibration()
        """Of the time of all steps: on average, what a run takes that the costs do not explain (stalls, mostly)."""

    @property
    def recorded(self) -> Prediction:
        """Of the run itself."""
        return self._prediction(self.run, self.own)

    def predict(self, settings: Settings) -> Prediction:
        """This run's rows with other settings."""
        return self._prediction(self.run, simulate(self.run.facts, self.rows, self.costs.model, settings))

    def predict_all(self, settings: Sequence[Settings], workers: Workers | None) -> list[Prediction]:
        """This run's rows with each of these settings, side by side where there are workers."""
        if workers is None:
            return [self.predict(each) for each in settings]
        subject = Subject(facts=self.run.facts, rows=self.rows, model=self.costs.model)
        return [self._prediction(self.run, outcome) for outcome in workers.outcomes(subject, settings)]

    def predict_run(self, other: RecordedRun, rows: RecordedRows, ledger: BlockLedger) -> Prediction:
        """Another run's rows with its settings; `ledger` takes its block events."""
        outcome = simulate(other.facts, rows, self.costs.model, other.facts.settings, ledger=ledger)
        return self._prediction(other, outcome)

    @cached_property
    def most_recorded(self) -> tuple[int, int]:
        """Rows and padded tokens of the largest steps that the costs were fitted on."""
        return int(self.run.column("batch_size").max()), int(self.run.column("padded_num_tokens").max())

    def _fit(self) -> FittedCosts:
        """What rows share in the cache no record says; a simulation of the run itself knows, where it follows it."""
        costs = fit_costs(self.run, SharedReads())
        if not (self.run.facts.reads_shared_prefixes_once and self.run.column("num_cached_tokens").any()):
            return costs
        shared = simulate(self.run.facts, self.rows, costs.model, self.run.facts.settings).shared
        if len(shared) != self.run.steps.num_rows:
            return costs
        return fit_costs(self.run, SharedReads(*(np.array(values) for values in zip(*shared, strict=True))))

    def _calibration(self) -> float:
        """1 for a run that cannot be simulated as it went."""
        run, own = self.run, self.own
        if not run.can_be_compared or own.num_steps != run.steps.num_rows:
            return 1.0
        return max(run.steps_seconds - self.costs.model.warm_up_ms / 1e3, 0.0) / own.seconds

    def _prediction(self, run: RecordedRun, outcome: Outcome) -> Prediction:
        mine = self.run
        steps_s = self.calibration * outcome.seconds + self.costs.model.warm_up_ms / 1e3
        recorded, predicted = mine.facts.graph_sizes(mine.facts.settings), run.facts.graph_sizes(outcome.settings)
        num_graphs = predicted.most_decode_graphs / recorded.most_decode_graphs if recorded and predicted else 1.0
        outside_s = mine.seconds_of(*PHASES_OUTSIDE) + (num_graphs - 1.0) * mine.seconds_of("capture")
        return Prediction(
            outcome=outcome,
            steps_s=steps_s,
            job_s=outside_s + mine.around_seconds + steps_s,
            latencies_s=self.calibration * outcome.latencies_s,
        )


def compare_events(run: RecordedRun, ledger: BlockLedger) -> str | None:
    """The first block event of `run` that a simulation of it has otherwise, in words; None where all are the same."""
    return first_difference(recorded_columns(run.block_events()), ledger.columns())
