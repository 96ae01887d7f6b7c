"""python -m jobs.simulate: what it prints, what it refuses, what it leaves alone."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.command_line import parse
from jobs.compose import compose_config
from jobs.generate_job import COMMAND
from jobs.launch import _source
from jobs.record_parts import read_records
from jobs.record_schemas import STEPS
from jobs.simulate import main
from jobs.simulation.grid import span
from jobs.simulation.settings import KEYS, Settings
from jobs.usage import UsageError
from tests.analysis.editing import edit, edit_manifest, rows_of, write_table
from tests.jobs.generate_process import ROOT
from tests.jobs.synthetic_run import SETTINGS, Row, law, write_run

LAW = law(
    forward={"step": 2.0, "rows of logits": 0.01, "TFLOP": 1.5, "decode context": 1e-4},
    submit={"step": 0.2},
    between={"finished row": 0.02},
)
SMALL = replace(SETTINGS, num_blocks=400, max_num_seqs=16, max_num_batched_tokens=512)
ROWS = [Row(num_prompt_tokens=40 + place % 30, num_output_tokens=20 + place % 17) for place in range(60)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a directory whose name Hydra could not read."""
    directory = tmp_path_factory.mktemp("runs") / "a=b,(c) 1"
    write_run(directory, ROWS, LAW, SMALL)
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "wide"
    write_run(directory, ROWS[:40], LAW, replace(SMALL, max_num_seqs=32))
    return directory


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(list(words)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


def test_a_grid_is_one_table(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", "kv.block_size=16,64", "engine.max_num_seqs=choice(8,16)")
    table = [line for line in lines if line.startswith("kv.block_size=")]
    assert [line.split()[:2] for line in table if "engine" in line] == [
        [f"kv.block_size={size}", f"engine.max_num_seqs={seqs}"] for size in (16, 64) for seqs in (8, 16)
    ]
    (measured,) = [line.split() for line in lines if line.startswith("as recorded, measured")]
    (predicted,) = [line.split() for line in lines if line.startswith("as recorded, predicted")]
    assert measured[3] == predicted[3]
    same = next(line for line in table if line.startswith("kv.block_size=16 engine.max_num_seqs=16"))
    assert same.split()[2:] == predicted[3:]
    assert "1.00x" in same
    assert any(line.startswith("block events with the recorded settings: identical (") for line in lines)
    assert any("error held out" in line for line in lines)


def test_latencies_of_rows_that_never_end_are_no_numbers(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", "engine.max_model_len=16")
    (line,) = [line for line in lines if line.startswith("engine.max_model_len=16  ")]
    assert line.split()[-2:] == ["-", "-"]
    assert not any("nan" in line for line in lines)


def test_a_poor_fit_comes_with_a_warning(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert not any("warning" in line for line in simulated(capsys, f"run={run}"))
    noisy = tmp_path / "noisy"
    shutil.copytree(run, noisy)
    draw = random.Random(3)
    edit(
        noisy, "steps", lambda rows: [row.update(forward_ms=row["forward_ms"] * draw.choice([0.2, 3])) for row in rows]
    )
    for words in ([], [f"against={run}"]):
        lines = simulated(capsys, f"run={noisy}", *words)
        assert sum("warning: the costs fit these steps poorly" in line for line in lines) == 1


def test_a_search_prints_the_words_of_the_best_configuration(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", "search=true", "engine.max_num_seqs=4,16,60", "kv.num_blocks=null,60")
    best = next(line for line in lines if line.startswith("best: ")).removeprefix("best: ")
    assert best == "engine.max_num_seqs=60 kv.num_blocks=null"
    config = compose_config(_source(COMMAND, parse([])), best.split()).config
    assert config.engine.max_num_seqs == 60


def test_a_search_without_keys_looks_around_the_recorded_configuration(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", "search=true")
    assert sum(line.startswith("kv.block_size=") and "engine.max_num_batched_tokens=" in line for line in lines) == 36
    assert any(line.startswith("best: kv.block_size=") for line in lines)
    assert any(line.startswith("*: has larger steps than the record") for line in lines)


def test_other_runs_stand_beside_what_was_measured(run: Path, wide: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", f"against={run}", f"against={wide.parent}/wi*e")
    table = [line for line in lines if str(run.parent.parent) in line and "identical" in line]
    assert len(table) == 2
    for line in table:
        assert abs(float(next(cell for cell in line.split() if cell.endswith("%")).rstrip("%"))) < 1.0


def test_rows_that_a_configuration_cannot_serve_are_counted(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", "engine.max_model_len=60", "search=true")
    assert "engine.max_model_len=60: 20 rows would fail: prompt_too_long 20" in lines
    assert any("rows would end before they did, at engine.max_model_len" in line for line in lines)
    assert "best: none of these answers every row in full; the recorded configuration does" in lines


def test_values_that_do_not_go_together_are_named_beside_those_that_do(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = simulated(capsys, f"run={run}", "engine.max_num_seqs=16,1024")
    assert any(
        line.startswith("engine.max_num_seqs=1024: cannot be: engine.max_num_batched_tokens=512") for line in lines
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run=DIR is missing"),
        (["run="], "run=: has no value"),
        (["run=nowhere"], "run=nowhere: does not exist; it must be a run directory"),
        (["{run}", "{run}"], "one run is simulated"),
        (["{run}", "model.path=tiny"], "model.path=tiny: cannot be simulated; what can be is kv.block_size, "),
        (["{run}", "engine.kernels=triton"], "engine.kernels=triton: cannot be simulated"),
        (["{run}", "+kv.block_size=16"], "+kv.block_size=16: cannot be simulated"),
        (["{run}", "--multirun"], "--multirun: not a word of this command"),
        (["{run}", "kv.block_size=0"], "kv.block_size=0: must be an integer from 1 to 4096"),
        (["{run}", "kv.block_size=big"], "kv.block_size='big': must be an integer from 1 to 4096"),
        (["{run}", "kv.block_size=[16,32]"], "kv.block_size=[16, 32]: must be an integer from 1 to 4096"),
        (["{run}", "kv.block_size=16,"], "kv.block_size=16,: "),
        (["{run}", "kv.block_size=interval(16,32)"], "kv.block_size=interval(16,32): an interval cannot be swept"),
        (["{run}", "kv.prefix_caching=2"], "kv.prefix_caching=2: must be true or false"),
        (["{run}", "engine.max_model_len=50000"], "engine.max_model_len=50000: must be at most 40960"),
        (["{run}", "engine.max_num_seqs=range(1,2000)"], "these words span 1,999 configurations"),
        (["{run}", "search=maybe"], "search=maybe: must be true or false"),
        (["{run}", "against=nowhere"], "against=nowhere: does not exist; it must be a run directory"),
        (["{run}", "against=.", "kv.block_size=16"], "kv.block_size=16: has no place beside against="),
    ],
)
def test_what_cannot_be_is_one_message(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    said = complaint(capsys, *(word.format(run=f"run={run}") for word in words))
    assert said.startswith(message) or message in said


def test_a_sweeps_runs_are_compared_and_one_is_simulated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in (1, 2):
        shutil.copytree(run, tmp_path / "sweep" / f"job-{number}")
    assert f"run={tmp_path / 'sweep'}: is 2 runs" in complaint(capsys, f"run={tmp_path / 'sweep'}")
    lines = simulated(capsys, f"run={run}", f"against={tmp_path / 'sweep'}")
    assert sum("/sweep/job-" in line and "identical" in line for line in lines) == 2


def test_a_run_of_a_newer_version_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "manifest.json").write_text(
        json.dumps(json.loads((run / "manifest.json").read_text()) | {"schema_version": 2})
    )
    assert "schema_version=2 is newer than 1" in complaint(capsys, f"run={tmp_path}")
    newer = tmp_path / "newer"
    shutil.copytree(run, newer)
    write_table(newer, "steps", rows_of(run, "steps"), STEPS.with_metadata({"schema_version": "4"}))
    assert "schema_version=4 is newer than 3" in complaint(capsys, f"run={newer}")


def test_a_run_of_an_older_version_is_predicted_alike(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    older = tmp_path / "older"
    shutil.copytree(run, older)
    schema = STEPS.remove(STEPS.get_field_index("in_halves")).with_metadata({"schema_version": "2"})
    write_table(older, "steps", rows_of(run, "steps"), schema)
    now, before = (simulated(capsys, f"run={path}", "engine.max_num_seqs=8,32") for path in (run, older))
    assert [line for line in before if "simulated in" not in line] == [
        line.replace(str(run), str(older)) for line in now if "simulated in" not in line
    ]
    assert not any("late captures" in line for line in now)
    edit_manifest(older, lambda manifest: manifest["engine"].pop("halves"))
    before = simulated(capsys, f"run={older}", "engine.max_num_seqs=8,32")
    assert any("late captures" in line for line in before), "as its version captured graphs"
    assert before[-2] == now[-2], "block events"


def test_a_run_that_left_no_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = tmp_path / "run"
    directory.mkdir()
    manifest = {"schema_version": 1, "config": {}, "status": "running", "attempts": []}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert "has no `engine`" in complaint(capsys, f"run={directory}")
    (directory / "manifest.json").write_text("{")
    assert "cannot be read" in complaint(capsys, f"run={directory}")
    (directory / "manifest.json").write_text(json.dumps({**manifest, "engine": {}}))
    assert "holds no step" in complaint(capsys, f"run={directory}")


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]):
    text = "\n".join(simulated(capsys, "--help"))
    assert all(key in text for key in KEYS)


def test_a_grid_counts_the_last_word_for_a_key():
    choices = span(["kv.block_size=16,32", "engine.max_num_seqs=8", "kv.block_size=64"], SETTINGS, None)
    assert [choice.words for choice in choices] == ["engine.max_num_seqs=8 kv.block_size=64"]
    assert isinstance(choices[0].settings, Settings)
    with pytest.raises(UsageError, match="must be at most 100"):
        span(["engine.max_model_len=200"], SETTINGS, 100)


def test_a_process_needs_no_torch_and_leaves_nothing(run: Path, tmp_path: Path):
    script = (
        "import sys; from jobs.simulate import main\n"
        f"code = main(['run={run}', 'kv.block_size=32', 'search=true'])\n"
        "sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    before = sorted(run.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(run.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_what_several_attempts_took_is_of_one_scope(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A run that was killed with a third of its steps done, and ended by its second attempt."""
    several = tmp_path / "several"
    shutil.copytree(run, several)
    table = read_records(several, "steps")
    third = table.num_rows // 3
    attempts = pa.array([0] * third + [1] * (table.num_rows - third), pa.int32())
    table = table.set_column(table.schema.get_field_index("attempt"), table.schema.field("attempt"), attempts)
    for part in (several / "records" / "steps").iterdir():
        part.unlink()
    pq.write_table(table, several / "records" / "steps" / "a0000-r0000-00000000.parquet")
    start, end = (table[name].to_numpy() / 1e9 for name in ("start_ns", "end_ns"))
    of_first, of_second = end[:third].max() - start[0], end[third:].max() - start[third]

    def phase(name: str, seconds: float) -> dict[str, object]:
        return {"name": name, "start_ns": 0, "end_ns": round(seconds * 1e9)}

    content = json.loads((several / "manifest.json").read_text())
    content["attempts"] = [
        {"attempt": 0, "phases": [phase("load", 2.0)]},
        {"attempt": 1, "phases": [phase("load", 3.0), phase("generate", of_second + 0.25), phase("write", 0.5)]},
        {"attempt": 2, "phases": [phase("generate", 100.0)], "recorder": False},
    ]
    (several / "manifest.json").write_text(json.dumps(content))

    lines = simulated(capsys, f"run={several}")

    head = "as recorded, measured in 3 attempts"
    (measured,) = [line.removeprefix(head).split() for line in lines if line.startswith(head)]
    assert float(measured[0]) == pytest.approx(of_first + of_second, abs=0.006)
    assert float(measured[1]) == pytest.approx(2.0 + of_first + 3.0 + of_second + 0.25 + 0.5, abs=0.006)
    predicted = next(line.split() for line in lines if line.startswith("as recorded, predicted"))
    assert float(predicted[4]) - float(predicted[3]) == pytest.approx(3.0 + 0.25 + 0.5, abs=0.011)
    assert any("not compared (it took 3 attempts)" in line for line in lines)
    assert "  note: rows of attempts with recorder=off are left out" in lines
    content["status"] = "failed"
    (several / "manifest.json").write_text(json.dumps(content))
    assert any(
        "not compared (it is not complete; its status is failed)" in line
        for line in simulated(capsys, f"run={several}")
    )
