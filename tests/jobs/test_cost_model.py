"""Records that follow a known law: the fit finds it, and the simulated clock adds it up exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.cost_fitting import SETTLING_MS
from jobs.simulation.cost_model import CostModel
from jobs.simulation.forward_cost import FEATURES, ForwardFeatures, SharedReads
from jobs.simulation.predictor import Predictor
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.recorded_steps import recorded_sizes
from jobs.simulation.settings import Settings
from jobs.simulation.simulator import simulate
from jobs.simulation.step_sizes import Padding, StepSizes, sizes_of_plan
from nanovllm.events import Recorder, ScheduleEvent
from nanovllm.runner.graph_sizes import NEVER, graph_sizes, next_size
from tests.analysis.editing import edit, edit_manifest
from tests.jobs.synthetic_run import ARCHITECTURE, SETTINGS, Row, law, write_run

SMALL = replace(SETTINGS, num_blocks=2000, max_num_seqs=96, max_num_batched_tokens=1024)
FORWARD = {
    "step": 1.5,
    "tokens up to 64": 0.004,
    "rows of logits": 0.01,
    "TFLOP": 1.6,
    "decode context": 1e-4,
}
LAW = law(
    forward=FORWARD,
    gap={"step": 0.02},
    submit={"step": 0.15, "row": 0.0003, "prefill token": 5e-5},
    postprocess={"step": 0.05, "row": 0.0002, "finished row": 0.01},
    between={"step": 0.03, "finished row": 0.05, "new prompt token": 1e-5},
    capture_ms=30.0,
)


def rows(count: int, seed: int, *, shared: int = 0) -> list[Row]:
    """Random lengths; each prompt begins with the same `shared` tokens."""
    rng = np.random.default_rng(seed)
    lengths = zip(rng.integers(shared + 20, shared + 300, count), rng.integers(5, 120, count), strict=True)
    made = [Row(num_prompt_tokens=int(prompt), num_output_tokens=int(output)) for prompt, output in lengths]
    return [
        replace(row, shared_prefix_row=0, shared_prefix_tokens=shared) if shared and place else row
        for place, row in enumerate(made)
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    directory = tmp_path_factory.mktemp("law") / "recorded"
    write_run(directory, rows(150, 1), LAW, SMALL)
    return Predictor(RecordedRun("run", directory))


def test_the_fit_finds_the_law(recorded: Predictor):
    model, costs = recorded.costs.model, recorded.costs
    found = dict(zip(FEATURES, model.forward.coefficients, strict=True))
    expected = {name: pytest.approx(FORWARD.get(name, 0.0), rel=0.02, abs=2e-3) for name in FEATURES}
    assert {name: value for name, value in found.items() if value != expected[name]} == {}
    assert model.capture_ms == pytest.approx(30.0, rel=1e-3)
    assert costs.num_late_captures > 3
    assert costs.num_other_padding == 0
    assert costs.error.mape < 0.002
    assert abs(costs.error.total) < 0.001


OTHERS = {
    "other lengths": (SMALL, rows(200, 2)),
    "larger batches": (replace(SMALL, max_num_seqs=128), rows(300, 3)),
    "smaller steps": (replace(SMALL, max_num_batched_tokens=256), rows(100, 4)),
    "a tight cache, with preemptions": (
        replace(SMALL, num_blocks=300),
        [replace(row, num_prompt_tokens=30, num_output_tokens=2 * row.num_output_tokens) for row in rows(100, 5)],
    ),
    "large blocks, a shared prefix": (replace(SMALL, block_size=32, num_blocks=1000), rows(100, 6, shared=256)),
    "one row": (SMALL, rows(1, 7)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_under_the_same_law_is_predicted(recorded: Predictor, name: str, tmp_path: Path):
    settings, others = OTHERS[name]
    measured = write_run(tmp_path / "other", others, LAW, settings)
    if "preemptions" in name:
        assert measured.num_preemptions > 5
    if "shared" in name:
        assert measured.hit_rate > 0.3
        assert max(shared.saved for shared in measured.shared) > 4096
    other = RecordedRun("against", tmp_path / "other")
    prediction = recorded.predict_run(other, read_rows(other).rows, BlockLedger())
    assert prediction.steps_s == pytest.approx(other.steps_seconds, rel=0.003)
    assert prediction.steps_s == pytest.approx(measured.seconds, rel=0.003)
    assert prediction.outcome.num_preemptions == measured.num_preemptions
    assert np.quantile(prediction.outcome.latencies_s, 0.99) == pytest.approx(
        np.quantile(measured.latencies_s, 0.99), rel=0.01
    )


def test_a_law_without_a_term_predicts_otherwise(recorded: Predictor, tmp_path: Path):
    """The negative control: the same rows on a device that reads its cache four times as slowly."""
    slow = law(forward={**FORWARD, "decode context": 4e-4}, capture_ms=30.0)
    write_run(tmp_path / "slow", rows(200, 2), slow, SMALL)
    other = RecordedRun("against", tmp_path / "slow")
    assert recorded.predict_run(other, read_rows(other).rows, BlockLedger()).steps_s < 0.8 * other.steps_seconds


def clock_of(tmp_path: Path, costs: CostModel, *, on_gpu: bool, row: Row) -> float:
    """Seconds that the steps of one row take; no graphs, so nothing is captured."""
    return write_run(tmp_path / f"{on_gpu}", [row], costs, SMALL, on_gpu=on_gpu, graphs=False).seconds


HOST_MS, AFTER_MS, GAP_MS = 3.0, 0.5, 0.25


@pytest.mark.parametrize(
    ("forward_ms", "on_gpu", "expected_ms"),
    [
        # 4 steps one after the other: 3 to submit, 10 + 0.25 to run; 0.5 between two of them.
        (10.0, False, 4 * (HOST_MS + 10.0 + GAP_MS) + 3 * AFTER_MS),
        # Look-ahead, the device is slower: the host is seen once, before the first step.
        (10.0, True, HOST_MS + 4 * (10.0 + GAP_MS)),
        # Look-ahead, the host is slower: steps 0 to 3 are submitted at 3, 6, 9.5, 13; the last one's result follows.
        (1.0, True, 4 * HOST_MS + 2 * AFTER_MS + 1.0 + GAP_MS),
    ],
)
def test_the_clock_adds_up(tmp_path: Path, forward_ms: float, on_gpu: bool, expected_ms: float):
    costs = law(
        forward={"step": forward_ms},
        gap={"step": GAP_MS},
        submit={"step": HOST_MS},
        between={"step": AFTER_MS},
        on_gpu=on_gpu,
    )
    row = Row(num_prompt_tokens=10, num_output_tokens=4)
    assert clock_of(tmp_path, costs, on_gpu=on_gpu, row=row) * 1e3 == pytest.approx(expected_ms, abs=1e-5)


def test_a_version_that_captures_all_at_the_start_captures_none_late(tmp_path: Path):
    write_run(tmp_path / "run", rows(150, 1), replace(LAW, capture_ms=0.0), SMALL)
    costs = Predictor(RecordedRun("run", tmp_path / "run")).costs
    assert costs.num_late_captures == costs.model.capture_ms == 0


def test_a_late_capture_waits_for_the_device(tmp_path: Path):
    """Step 0 has a shape of its own, and the host another 20 ms; decode shapes are there from the start."""
    costs = law(forward={"step": 10.0}, submit={"step": 1.0}, capture_ms=20.0)
    outcome = write_run(tmp_path / "run", [Row(num_prompt_tokens=10, num_output_tokens=2)], costs, SMALL)
    assert outcome.seconds * 1e3 == pytest.approx(20.0 + 1.0 + 2 * 10.0, abs=1e-5)


class _Plans(Recorder):
    def __init__(self) -> None:
        self.sizes: list[StepSizes] = []

    def on_schedule(self, event: ScheduleEvent) -> None:
        self.sizes.append(sizes_of_plan(event.plan))


def test_sizes_of_plans_are_those_of_their_records(recorded: Predictor):
    plans = _Plans()
    simulate(recorded.run.facts, recorded.rows, LAW, SMALL, recorders=[plans])
    from_records = recorded_sizes(recorded.run)
    assert {len(plans.sizes)} == {len(column) for column in from_records}
    for place, column in enumerate(from_records):
        assert column.tolist() == [sizes[place] for sizes in plans.sizes]
    assert any(sizes.prefill_pairs and sizes.num_decodes for sizes in plans.sizes)


def test_one_step_costs_what_it_costs_among_many(tmp_path: Path):
    costs = law(
        forward={name: 0.1 + place for place, name in enumerate(FEATURES)},
        gap={"step": 0.02, "step with prefills": 0.5},
        submit={"step": 0.15, "row": 0.0003, "prefill token": 5e-5, "prefill row": 0.7},
    )
    much = replace(SMALL, max_num_seqs=160, max_num_batched_tokens=8192, num_blocks=40_000)
    long_rows = [replace(row, num_prompt_tokens=4 * row.num_prompt_tokens) for row in rows(160, 1, shared=200)]
    write_run(tmp_path / "run", long_rows, costs, much, with_halves=True)
    run = RecordedRun("run", tmp_path / "run")
    sizes, padding = recorded_sizes(run), Padding.of(run.facts, much)
    draw = np.random.default_rng(4)
    saved = draw.integers(0, 3, run.steps.num_rows) * 50
    shared = SharedReads(saved, 2 * saved)
    assert 0 < padding.in_halves(sizes, saved).sum() < padding.in_halves(sizes, 0).sum()
    alone = [
        costs.of_step(StepSizes(*(int(column[place]) for column in sizes)), padding, SharedReads(some, 2 * some))
        for place, some in enumerate(saved.tolist())
    ]
    submit, forward, gap = (np.array(column) for column in zip(*alone, strict=True))
    np.testing.assert_allclose(submit, costs.submit_ms(sizes), rtol=1e-12)
    np.testing.assert_allclose(forward, costs.forward_ms(sizes, padding, shared), rtol=1e-12)
    np.testing.assert_allclose(gap, costs.gap_ms(sizes), rtol=1e-12)


@pytest.mark.parametrize(("seqs", "tokens"), [(1, 64), (100, 1000), (700, 9000)])
def test_steps_are_padded_as_the_runner_pads_them(recorded: Predictor, seqs: int, tokens: int):
    settings = replace(SMALL, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    padding, sizes = (
        Padding.of(recorded.run.facts, settings),
        graph_sizes(seqs, tokens, with_prefills=True, with_halves=False),
    )
    for count in range(1, seqs + 1):
        assert padding.padded(StepSizes(count, count, count, count, 0, 0))[0] == next_size(sizes.decodes, count)
        both = padding.padded(StepSizes(count, count - 1, count, count, 0, 0))
        assert both == (next_size(sizes.tokens, count), next_size(sizes.sampled, count))


@pytest.mark.parametrize("with_halves", [False, True])
def test_steps_run_in_halves_where_the_runner_runs_them_so(with_halves: bool, tmp_path: Path):
    """At a cost that the fit finds, and that other runs are predicted with."""
    forward = {**FORWARD, "whole step": 0.7}
    much = replace(SMALL, max_num_seqs=160, max_num_batched_tokens=8192, num_blocks=40_000)
    long_rows = [
        replace(row, num_prompt_tokens=8 * row.num_prompt_tokens, num_output_tokens=5 * row.num_output_tokens)
        for row in rows(160, 1)
    ]
    costs = law(forward=forward, submit={"step": 0.15}, capture_ms=30.0)
    write_run(tmp_path / "run", long_rows, costs, much, with_halves=with_halves)
    predictor = Predictor(RecordedRun("run", tmp_path / "run"))
    sizes = recorded_sizes(predictor.run)
    padding = Padding.of(predictor.run.facts, much)
    halved = padding.in_halves(sizes, 0)
    graphs = graph_sizes(160, much.max_num_batched_tokens, with_prefills=True, with_halves=with_halves)
    expected = [
        rows == decodes and graphs.runs_in_halves(rows, context)
        for rows, decodes, context in zip(sizes.num_rows, sizes.num_decodes, sizes.decode_context, strict=True)
    ]
    assert halved.tolist() == predictor.run.column("in_halves").tolist() == expected
    assert not padding.in_halves(sizes, np.ones(len(halved))).any(), "not those that read a prefix apart"
    assert (100 < halved.sum() < len(halved) - 100) == with_halves
    model = predictor.costs.model
    assert model.whole_ms == pytest.approx(0.7 if with_halves else 0.0, rel=0.02)
    write_run(tmp_path / "other", long_rows[40:120] + rows(100, 2), costs, much, with_halves=with_halves)
    other = RecordedRun("against", tmp_path / "other")
    prediction = predictor.predict_run(other, read_rows(other).rows, BlockLedger())
    assert prediction.steps_s == pytest.approx(other.steps_seconds, rel=0.003)


def test_what_the_record_says_of_halves_counts_and_the_rule_where_it_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run of a version that halved steps of less context."""
    settings = replace(SMALL, max_num_seqs=64, max_num_batched_tokens=8192)
    costs = law(forward={**FORWARD, "whole step": 0.7}, submit={"step": 0.15}, capture_ms=30.0)
    with monkeypatch.context() as patch:
        patch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_TOKENS", 8_000)
        write_run(tmp_path / "run", rows(300, 1, shared=32), costs, settings, with_halves=True)
    run = RecordedRun("run", tmp_path / "run")
    assert 100 < run.column("in_halves").sum() < run.steps.num_rows - 100
    assert run.column("num_cached_tokens").any()
    assert not Padding.of(run.facts, settings).in_halves(recorded_sizes(run), 0).any(), "this version would halve none"
    assert Predictor(run).costs.model.whole_ms == pytest.approx(0.7, rel=0.05)
    edit(tmp_path / "run", "steps", lambda steps: [step.update(in_halves=None) for step in steps])
    assert Predictor(RecordedRun("run", tmp_path / "run")).costs.model.whole_ms == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("halves", [False, True])
def test_whether_more_sequences_would_run_in_halves_is_in_the_manifest(halves: bool, tmp_path: Path):
    """Of a run with too few for that, which an older version's words did not say."""
    few, many = replace(SMALL, max_num_seqs=4), replace(SMALL, max_num_seqs=100)
    write_run(tmp_path / "run", rows(5, 1), replace(LAW, capture_ms=0.0), few, with_halves=halves)

    def sizes() -> list[list[int]]:
        run = RecordedRun("run", tmp_path / "run")
        graphs = [run.facts.graph_sizes(settings) for settings in (few, many)]
        return [graph.in_halves for graph in graphs if graph is not None]

    assert sizes() == [[], [8, 16, 24, 32, 64, 96, 100] if halves else []]
    edit_manifest(tmp_path / "run", lambda manifest: manifest["engine"].pop("halves"))
    assert sizes() == [[], []]
    words = f"decode steps of 1 to 64 sequences{', in halves up to 64' if halves else ''}, prefill steps"
    edit_manifest(tmp_path / "run", lambda manifest: manifest["engine"].update(cuda_graphs=words))
    assert bool(sizes()[1]) == halves


def test_shared_prefixes_are_read_once_where_the_runner_reads_them_once(tmp_path: Path):
    """Saved tokens shorten a step under a law by which the context counts, and only there."""
    others = rows(60, 8, shared=512)
    costs = law(forward={"step": 1.0, "decode context": 1e-3})
    once = write_run(tmp_path / "once", others, costs, SMALL)
    each = write_run(tmp_path / "each", others, costs, SMALL, attention="flash_attn (asked for)")
    assert each.shared == []
    sizes = recorded_sizes(RecordedRun("once", tmp_path / "once"))
    assert len(once.shared) == len(sizes.num_rows)
    saved = sum(shared.saved for shared in once.shared)
    assert saved > 100_000
    assert each.seconds - once.seconds == pytest.approx(saved * 1e-6, rel=1e-6)


def test_settings_keep_the_bytes_of_the_cache():
    assert SETTINGS.changed({"kv.block_size": 64}).num_blocks == SETTINGS.num_blocks // 4
    assert SETTINGS.changed({"kv.block_size": 64, "kv.num_blocks": 7}).num_blocks == 7
    assert SETTINGS.changed({"kv.num_blocks": None, "kv.block_size": None}) == SETTINGS
    assert isinstance(SETTINGS.changed({}), Settings)


def test_a_gpus_attention_of_prompts_counts_as_operations_and_a_cpus_apart():
    on_gpu, on_cpu = (ForwardFeatures.of_model(ARCHITECTURE, on_gpu=on_gpu) for on_gpu in (True, False))
    first, second = (
        dict(zip(FEATURES, features.columns(MIXED, PADDING, SharedReads(), NOT_HALVED), strict=True))
        for features in (on_gpu, on_cpu)
    )
    assert first["decode context"].tolist() == second["decode context"].tolist() == [5000, 1000, 3000]
    assert first["pairs"] == 0
    assert second["pairs"].tolist() == [100_000, 1_000_000, 0]
    without = MIXED._replace(prefill_pairs=np.zeros(3, np.int64))
    bare = dict(zip(FEATURES, on_gpu.columns(without, PADDING, SharedReads(), NOT_HALVED), strict=True))
    operations = (first["TFLOP"] - bare["TFLOP"]) * 1e12
    assert operations.tolist() == pytest.approx([100_000 * 229_376, 1_000_000 * 229_376, 0])


def test_what_few_tokens_wait_for_is_hidden_behind_many():
    """From 1,024 tokens to 2,048 on a GPU; and beyond 256 rows of logits only their operations count."""
    rows = np.array([32, 256, 1024])
    tokens = np.array([512, 1536, 4096])
    padding = replace(PADDING, of_decodes=np.arange(4097), of_tokens=np.arange(4097), of_sampled=np.arange(4097))
    sizes = StepSizes(rows, rows * 0, tokens, rows, rows * 0, rows * 0)
    found = {}
    for on_gpu in (True, False):
        features = ForwardFeatures.of_model(ARCHITECTURE, on_gpu=on_gpu)
        columns = features.columns(sizes, padding, SharedReads(), NOT_HALVED)
        found[on_gpu] = {name: np.broadcast_to(c, 3).tolist() for name, c in zip(FEATURES, columns, strict=True)}
    assert found[True]["tokens up to 64"] == [64, 32, 0]
    assert found[True]["rows of logits"] == [32, 256, 256]
    assert found[False]["tokens up to 64"] == [64, 64, 64]
    assert found[False]["rows of logits"] == rows.tolist()


def test_a_gpus_first_moments_are_left_out_of_a_fit_where_enough_steps_remain(tmp_path: Path):
    """It is faster until its power holds it down."""
    costs = law(forward={"step": 1.0, "decode context": 1e-4, "TFLOP": 1.5})
    write_run(tmp_path / "run", rows(150, 2), costs, SMALL)
    run = RecordedRun("run", tmp_path / "run")
    early = (run.column("end_ns") < run.column("start_ns")[0] + SETTLING_MS * 1e6).tolist()
    assert 3 < sum(early) < len(early) / 2

    def faster(steps: list[dict[str, Any]]) -> None:
        for step, first in zip(steps, early, strict=True):
            step["forward_ms"] *= 0.9 if first else 1.0

    edit(tmp_path / "run", "steps", faster)
    found = Predictor(RecordedRun("run", tmp_path / "run")).costs.model.forward
    assert dict(zip(FEATURES, found.coefficients, strict=True))["step"] == pytest.approx(1.0, rel=0.01)


def _sizes(*steps: tuple[int, ...]) -> StepSizes:
    return StepSizes(*(np.array(column) for column in zip(*steps, strict=True)))


MIXED = _sizes((3, 2, 100, 3, 5000, 100_000), (3, 2, 900, 3, 1000, 1_000_000), (3, 3, 3, 3, 3000, 0))
NOT_HALVED = np.zeros(3, np.bool_)
PADDING = Padding(
    graphs=None,
    multiple=1,
    of_decodes=np.arange(1000),
    of_tokens=np.arange(1000),
    of_sampled=np.arange(1000),
    halves_from=np.full(1000, NEVER),
)
