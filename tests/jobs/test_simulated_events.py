"""The simulator runs the real scheduler: with a run's own settings its block events are the recorded ones."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.event_comparison import first_difference, recorded_columns
from jobs.simulation.predictor import Predictor
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.settings import Settings
from jobs.simulation.simulator import simulate
from nanovllm.runner import model_runner
from nanovllm.runner.uploads import Uploader
from tests.jobs.generate_process import Finished, bundled_rows, generate, write_rows

TIGHT = (
    "kv.num_blocks=26",
    "engine.max_num_seqs=5",
    "engine.max_num_batched_tokens=70",
    "sampling.max_tokens=50",
    "sampling.ignore_eos=true",
)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with a common system message, two of them equal, one alone; some that can never be answered."""
    rows = bundled_rows(9)
    lone = {"id": "lone", "prompt_token_ids": [9, 8, 7]}
    bad: list[object] = [{"id": "no prompt"}, {"id": "too long", "prompt_token_ids": [5] * 3000}]
    mixed = [*rows[:4], *bad, *rows[4:], {**rows[3], "id": "again"}, lone]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", mixed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> Finished:
    run = generate(tmp_path_factory.mktemp("runs") / "tight", f"input={rows_file}", *TIGHT)
    assert run.code == 3
    return run


def difference(directory: Path, settings: Settings | None = None) -> str | None:
    """The first block event that a simulation has otherwise than the record."""
    run = RecordedRun("run", directory)
    predictor = Predictor(run)
    ledger = BlockLedger()
    simulate(run.facts, predictor.rows, predictor.costs.model, settings or run.facts.settings, ledger=ledger)
    assert len(ledger.columns()["step"]) > 100
    return first_difference(recorded_columns(run.block_events()), ledger.columns())


def kinds(run: Finished) -> Counter[str]:
    return Counter(event["event"] for event in run.table("block_events"))


def test_events_are_the_recorded_ones_with_chunks_shared_prefixes_preemptions_and_failed_rows(tight: Finished):
    steps = tight.table("steps")
    assert set(kinds(tight)) == {"allocate", "hit", "commit", "free", "release", "evict"}
    assert sum(step["num_preempted"] for step in steps) > 0
    assert {step["phase"] for step in steps} == {"prefill", "decode", "mixed"}
    assert len(tight.failures) == 2
    assert difference(tight.directory) is None


def test_another_configuration_has_other_events(tight: Finished):
    settings = RecordedRun("run", tight.directory).facts.settings
    assert difference(tight.directory, replace(settings, num_blocks=settings.num_blocks + 1)) is not None
    assert difference(tight.directory, replace(settings, max_num_batched_tokens=69)) is not None


def test_rows_that_end_by_themselves_and_equal_answers_to_equal_prompts(tmp_path: Path):
    """Greedy rows with equal prompts publish equal blocks of output: the recorded tokens say so, and nothing else."""
    rows = bundled_rows(6)
    again = [{**row, "id": f"{row['id']} again"} for row in rows]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, *again])
    run = generate(
        tmp_path / "run", f"input={file}", "sampling.temperature=0", "kv.block_size=4", "engine.max_num_seqs=4"
    )
    assert {row["finish_reason"] for row in run.generations} == {"stop"}
    assert difference(run.directory) is None
    (run.directory / "generations.jsonl").unlink()
    assert difference(run.directory) is not None


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_runner_that_looks_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: int):
    """As on a GPU: step n+1 is scheduled before step n's tokens are known, and some tokens are dropped."""

    class AheadRunner(model_runner.ModelRunner):
        def __init__(self, *words: object, **named: object) -> None:
            super().__init__(*words, **named)  # type: ignore[arg-type]
            self.lookahead, self._depth = 1, 2
            self._uploader = Uploader(self.device, self._depth)
            self._token_buffers = [buffer.clone() for buffer in 2 * self._token_buffers]

    monkeypatch.setattr("nanovllm.assembly.ModelRunner", AheadRunner)
    rows = [{**row, "sampling": {"ignore_eos": place % 2 == 0}} for place, row in enumerate(bundled_rows(12))]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["kv.num_blocks=16", *TIGHT[1:], f"sampling.temperature={temperature}"]
    run = generate(tmp_path / "run", f"input={file}", *words)
    steps = run.table("steps")
    assert sum(len(step["dropped_seq_ids"]) for step in steps) > 2
    assert sum(step["num_preempted"] for step in steps) > 0
    assert {row["finish_reason"] for row in run.generations} == {"stop", "length"}
    assert difference(run.directory) is not None  # taken for a CPU's run
    manifest = run.manifest
    manifest["engine"]["device"] = "cuda:0"
    (run.directory / "manifest.json").write_text(json.dumps(manifest))
    assert difference(run.directory) is None


def test_a_run_that_was_cut_off_is_simulated_without_the_rows_that_never_ended(tight: Finished, tmp_path: Path):
    """As SIGKILL leaves it: some requests are not there, long ones that came first; the manifest says running."""
    directory = tmp_path / "cut"
    shutil.copytree(tight.directory, directory)
    manifest = tight.manifest
    manifest["status"] = "running"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    run = RecordedRun("run", directory)
    run.requests = run.requests.filter(~np.isin(run.requests["row"].to_numpy(), [0, 2]))
    kept = set(run.requests["row"].to_pylist())
    shared = {request["shared_prefix_row"] for request in run.requests.to_pylist()} - {None}
    assert not run.can_be_compared
    assert shared - kept, "no row shares its prefix with one that never ended"
    predictor = Predictor(run)
    outcome = predictor.predict(run.facts.settings).outcome
    assert len(outcome.latencies_s) == len(kept)
    assert outcome.num_cached_tokens > 0
    assert outcome.num_output_tokens == sum(run.requests["num_output_tokens"].to_pylist())


def test_figures_of_a_simulation_are_those_of_the_run(tight: Finished):
    run = RecordedRun("run", tight.directory)
    assert run.facts.engine["architecture"]["vocab_size"] > 0
    outcome = Predictor(run).predict(run.facts.settings).outcome
    figures = tight.manifest["figures"]
    assert outcome.num_steps == figures["num_steps"]
    assert outcome.num_output_tokens == figures["num_output_tokens"]
    assert outcome.num_prompt_tokens == figures["num_prompt_tokens"]
    assert outcome.hit_rate == figures["prefix_cache_hit_rate"] > 0
    assert outcome.num_preemptions == figures["num_preemptions"] > 0
    assert np.isclose(outcome.seconds, figures["seconds"], rtol=0.5)  # this machine's own time, give or take
