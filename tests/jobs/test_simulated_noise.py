"""A device that keeps no law exactly: times that scatter and wander, stalls, a slow beginning, steps in its kernels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.simulation import simulator
from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.cost_model_runner import CostModelRunner
from jobs.simulation.predictor import Predictor
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_run import RecordedRun
from nanovllm.engine.plan import Plan
from tests.jobs.synthetic_run import SETTINGS, Row, law, write_run

SMALL = replace(SETTINGS, num_blocks=2000, max_num_seqs=96, max_num_batched_tokens=1024)
LAW = law(
    forward={"step": 1.5, "step with prefills": 0.2, "rows of logits": 0.004, "TFLOP": 1.6, "decode context": 1e-4},
    gap={"step": 0.02},
    submit={"step": 0.15, "row": 0.0003, "prefill token": 5e-5},
    between={"step": 0.05, "finished row": 0.05, "new prompt token": 1e-5},
    capture_ms=20.0,
)
SLOW_STEPS, SLOW_MS = 3, 150.0


class RoughRunner(CostModelRunner):
    """The cost model's times, but no two alike."""

    num_stalls = 0
    _num_submitted = 0
    _rng = np.random.default_rng(7)

    def submit(self, plan: Plan) -> None:
        if self._rng.random() < 0.004:
            type(self).num_stalls += 1
            self.spend(float(self._rng.exponential(15.0)))
        super().submit(plan)
        result, done = self._results.pop()
        factor = 1 + 0.015 * self._rng.normal() + 0.01 * np.sin(self._num_submitted / 60)
        ms = result.forward_ms * factor + 0.08 * (plan.num_rows % 64 < 8)
        ms += SLOW_MS if self._num_submitted < SLOW_STEPS else 0.0
        self._num_submitted += 1
        self._device_free = done + ms - result.forward_ms
        self._results.append((replace(result, forward_ms=ms), self._device_free))


def rows(count: int, seed: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Row]:
    rng = np.random.default_rng(seed)
    lengths = zip(rng.integers(*prompts, count), rng.integers(*outputs, count), strict=True)
    return [Row(num_prompt_tokens=int(prompt), num_output_tokens=int(output)) for prompt, output in lengths]


OTHERS = {
    "larger batches": (replace(SMALL, max_num_seqs=192), rows(300, 2, (20, 300), (5, 120))),
    "a tight cache": (replace(SMALL, num_blocks=300), rows(100, 3, (20, 60), (50, 250))),
    "smaller steps": (replace(SMALL, max_num_batched_tokens=256), rows(150, 4, (20, 300), (5, 120))),
    "mostly prefill": (SMALL, rows(400, 5, (200, 250), (2, 8))),
    "few and long": (replace(SMALL, max_num_seqs=8), rows(8, 6, (1500, 2000), (200, 300))),
}


def test_five_other_configurations_and_workloads_are_predicted_within_five_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(simulator, "CostModelRunner", RoughRunner)
    write_run(tmp_path / "recorded", rows(250, 1, (20, 300), (5, 150)), LAW, SMALL)
    measured = {name: write_run(tmp_path / name, load, LAW, settings) for name, (settings, load) in OTHERS.items()}
    assert RoughRunner.num_stalls > 5
    assert measured["a tight cache"].num_preemptions > 5
    monkeypatch.undo()
    predictor = Predictor(RecordedRun("run", tmp_path / "recorded"))
    assert predictor.costs.model.warm_up_ms == pytest.approx(SLOW_STEPS * SLOW_MS, rel=0.1)
    errors, naive = {}, {}
    for name, outcome in measured.items():
        other = RecordedRun("against", tmp_path / name)
        prediction = predictor.predict_run(other, read_rows(other).rows, BlockLedger())
        assert prediction.outcome.num_preemptions == outcome.num_preemptions
        errors[name] = prediction.steps_s / outcome.seconds - 1
        naive[name] = outcome.num_output_tokens / predictor.recorded.output_tokens_per_s / outcome.seconds - 1
    assert {name: error for name, error in errors.items() if abs(error) > 0.05} == {}
    # What the recorded run's tokens per second would say is no such prediction.
    assert sum(abs(error) > 0.1 for error in naive.values()) >= 3, naive
    assert predictor.recorded.steps_s == pytest.approx(predictor.run.steps_seconds, rel=1e-3)


def test_of_a_row_that_was_done_again_the_last_time_counts(tmp_path: Path):
    """As a resumed run leaves it: given up in one attempt, done in the next, under another seq_id."""
    load = rows(20, 8, (20, 60), (5, 20))
    write_run(tmp_path / "run", load, LAW, SMALL)
    run = RecordedRun("run", tmp_path / "run")
    first = run.requests.to_pylist()
    given_up = [{**request, "finish_reason": "aborted", "num_output_tokens": 1} for request in first[:15]]
    again = [{**request, "attempt": 1, "seq_id": 100 + request["seq_id"]} for request in first[:12]]
    run.requests = pa.Table.from_pylist([*given_up, *first[15:], *again], run.requests.schema)
    found = read_rows(run)
    ended = [request["row"] for request in [*first[15:], *first[:12]]]
    assert found.rows.row.tolist() == sorted(ended)
    assert found.num_left_out == 3
    assert found.rows.num_output_tokens.tolist() == [load[row].num_output_tokens for row in sorted(ended)]
