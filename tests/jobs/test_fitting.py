"""Non-negative fits: what bends them, what they doubt, what they believe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.simulation.cost_model import BETWEEN
from jobs.simulation.fitting import fit, held_out_error
from jobs.simulation.predictor import Predictor
from jobs.simulation.recorded_run import RecordedRun
from tests.jobs.synthetic_run import Row, law, write_run
from tests.jobs.test_cost_model import FORWARD, SMALL


def test_outliers_do_not_bend_a_fit():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 1000, 500).astype(float)
    values = 2.0 + 0.01 * tokens
    values[100:500:50] += 100.0
    values[3] += 5000.0  # a warm-up
    found = fit(("step", "token"), (1.0, tokens), values)
    assert found.fit.coefficients == pytest.approx([2.0, 0.01])
    assert np.flatnonzero(found.outliers).tolist() == [3, *range(100, 500, 50)]
    error = held_out_error(("step", "token"), (1.0, tokens), values, num_warm_up=16)
    assert error.mape < 1e-6
    assert error.total == pytest.approx(-800 / values[16:].sum(), rel=1e-6)  # what the outliers take in all


def test_no_cost_is_negative():
    tokens = np.arange(1.0, 100.0)
    found = fit(("step", "token"), (1.0, tokens), 10.0 - 0.05 * tokens)
    assert (found.fit.coefficients >= 0).all()


def test_what_a_run_cannot_tell_apart_is_not_put_on_a_doubted_cost():
    """One step with prefills: its time goes to its tokens, not to there being prefills."""
    tokens = np.array([1.0] * 50 + [1000.0])
    found = fit(("step", "prefill", "token"), (1.0, tokens > 1, tokens), 1.0 + 0.1 * tokens, doubted={"prefill": 0.1})
    assert found.fit.predict((np.ones(1), np.ones(1), np.full(1, 500.0))) == pytest.approx(51.0, rel=0.01)


ENDS = law(forward=FORWARD, between={"step": 0.03, "step with finished rows": 0.3, "finished row": 0.1})


def ends_fitted(directory: Path, output_lengths: list[int], most: range) -> tuple[float, float]:
    """Of a run by ENDS in which rows of these lengths end: what one that ends costs, and what each more does.

    `most` is how many end together at most.
    """
    load = [Row(num_prompt_tokens=64, num_output_tokens=length) for length in output_lengths]
    write_run(directory, load, ENDS, replace(SMALL, max_num_seqs=len(load), max_num_batched_tokens=64 * len(load)))
    run = RecordedRun("run", directory)
    assert run.column("num_finished").max() in most
    found = dict(zip(BETWEEN, Predictor(run).costs.model.between.coefficients, strict=True))
    return found["step with finished rows"] + found["finished row"], found["finished row"]


def test_a_run_in_which_rows_end_one_by_one_does_not_say_what_a_hundred_cost(tmp_path: Path):
    """What follows on that must not be a hundred times the little that a second row seems to add."""
    lengths = [*range(20, 220, 2), *range(20, 40, 4)]  # a few times two of them
    first, second = ends_fitted(tmp_path / "run", lengths, range(2, 4))
    assert first == pytest.approx(0.4, rel=0.05)
    assert second < 0.08


def test_a_run_in_which_many_end_at_once_is_believed(tmp_path: Path):
    first, second = ends_fitted(tmp_path / "run", [*range(20, 220, 2), *[300] * 100, 310], range(50, 101))
    assert first == pytest.approx(0.4, rel=0.02)
    assert second == pytest.approx(0.1, rel=0.02)
