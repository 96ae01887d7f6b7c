"""From the command line to an exit code: messages, directories, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.launch import launch
from tests.jobs.standin import COMMAND
from tests.jobs.standin_process import ROOT, finish, manifests, start, wait_until_ready

SHOWING = (["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve", "model=qwen3"], ["--info", "defaults"])


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def only_run() -> Path:
    """The one run directory below outputs/."""
    (path,) = Path("outputs").glob("*/*")
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["modle=qwen3"], ["modle=qwen3", "no such key", "did you mean model?"]),
        (["kv.blok_size=1"], ["kv.blok_size=1", "did you mean kv.block_size?", "num_blocks, memory_fraction"]),
        (["block_size=1"], ["block_size=1", "did you mean kv.block_size?"]),
        (["kv.a.b=1"], ["kv.a.b=1: no such key", "Keys of kv: block_size"]),
        (["+kv.foo=1"], ["+kv.foo=1: no such key"]),
        (["++foo=1"], ["++foo=1: no such key"]),
        (["resume=somewhere"], ["resume=somewhere: tests.jobs.standin cannot go on with a run"]),
        (["sampling.n=2"], ["sampling.n=2: no such key"]),
        (["expriment=x"], ["expriment=x: no such key", "did you mean experiment?"]),
        (["model=qwen33"], ["model=qwen33", "did you mean qwen3?", "qwen3_8b, tiny"]),
        (["experiment=none"], ["experiment=none: no such choice", "preemption, prefix_sharing"]),
        (["recorder=true"], ["recorder=true: must be one of off, on"]),
        (["recorder=null"], ["recorder=null: must be one of off, on"]),
        (["~recorder"], ["~recorder: nothing can be deleted"]),
        (["+experiment=preemption"], ["experiment=NAME"]),
        (["kv.block_size=big"], ["kv.block_size=big: must be an integer"]),
        (["kv.block_size=1.5"], ["kv.block_size=1.5: must be an integer"]),
        (["kv.block_size=null"], ["kv.block_size=null: must be an integer"]),
        (["sampling.temperature=hot"], ["sampling.temperature=hot: must be a number or null"]),
        (["sampling.stop=x"], ["sampling.stop=x: must be a list of texts", "[a,b]"]),
        (["recorder.enabled=maybe"], ["recorder.enabled=maybe: must be true or false"]),
        (["kv.block_size=0"], ["kv.block_size=0: must be an integer from 1 to 4096"]),
        (["kv.memory_fraction=nan"], ["kv.memory_fraction=nan: must be above 0 and at most 1"]),
        (["sampling.temperature=inf"], ["sampling.temperature=inf: must be a number"]),
        (["sampling.top_p=2"], ["sampling.top_p=2.0: must be a number, above 0 and at most 1"]),
        (["device=tpu"], ["device=tpu: must be one of auto, cpu, cuda"]),
        (["log_level=loud"], ["log_level=loud: must be one of DEBUG, INFO, WARNING, ERROR"]),
        (["seed=-1"], ["seed=-1: must be an integer from 0 to"]),
        (["engine.max_num_seqs=9999"], ["engine.max_num_batched_tokens=8192", "engine.max_num_seqs=9999"]),
        (["parallel.tensor_parallel_size=2"], ["parallel.tensor_parallel_size=2: must be 1"]),
        (["model.path=???"], ["model.path=???: has no value", "model=NAME"]),
        (["input=${input}"], ["input=${input}: Recursive interpolation"]),
        (["input=${nowhere}"], ["input=${nowhere}", "'nowhere' not found"]),
        (["input=${oc.env:NANOVLLM_NOT_SET}"], ["input=***", "NANOVLLM_NOT_SET"]),
        (["input=a,b"], ["input=[a,b]", "'input=\"a,b\"'", "add -m"]),
        (["kv.block_size=range(1,4)"], ["kv.block_size=range(1,4)", "add -m"]),
        (["prompts.jsonl"], ["prompts.jsonl: not an override; write key=value"]),
        (["=5"], ["=5: not an override"]),
        (["--bogus"], ["--bogus", "--hydra-help"]),
        (["--cfg", "job", "-m"], ["--cfg --multirun: only one of these"]),
        (["--resolve"], ["--resolve go with --cfg"]),
        (["--cfg", "job", "modle=1"], ["modle=1: no such key"]),
        (["--help", "model=nope"], ["model=nope: no such choice"]),
        (["--cfg", "job", "--resolve", "kv.block_size=0"], ["kv.block_size=0: must be"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir=true: has no effect"]),
        (["hydra.verbose=true"], ["hydra.verbose=true", "log_level=DEBUG"]),
        (["hydra/launcher=basic"], ["hydra/launcher=basic: has no effect"]),
        (["+hydra.launcher._target_=os.system"], ["+hydra.launcher._target_=os.system: has no effect"]),
        (["hydra.sweep.dir=x"], ["hydra.sweep.dir=x", "-m"]),
        (["hydra.run.dir=${nowhere}"], ["hydra.run.dir", "'nowhere' not found"]),
        (["hydra.run.dir='a b'"], ["hydra.run.dir=", "'a b' is not allowed", "a-b"]),
        (["--config-dir", "nowhere"], ["nowhere: no such configuration directory"]),
        (["--config-name", "other"], ["other: no such configuration"]),
        (["input=missing"], ["input=missing: no such file"]),
        (["input=cannot-start"], ["device=cuda: this machine has no CUDA device"]),
        (["-m", "kv.block_size=0,-1"], ["kv.block_size=0: must be an integer"]),
        (["-m", "kv.blok_size=16,32"], ["kv.blok_size=16", "did you mean kv.block_size?"]),
        (["-m", "model=nope,tiny2"], ["model=nope: no such choice"]),
        (["-m", "input=-", "seed=1,2"], ["input=-: a sweep cannot read standard input"]),
        (["-m", "seed=interval(1,2)"], ["seed=interval(1,2): an interval cannot be swept"]),
        (["-m", "hydra.run.dir=x"], ["hydra.run.dir=x", "hydra.sweep.dir"]),
        (["-m", "modle=x", "seed=1,2"], ["modle=x: no such key"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 4 else None,
)
def test_a_mistake_is_one_message_exit_code_2_and_no_directory(
    words: list[str], says: list[str], capfd: pytest.CaptureFixture[str]
):
    assert launch(COMMAND, words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"one message on one line: {err}"
    for part in says:
        assert part in err
    for noise in ("Traceback", "HYDRA_FULL_ERROR", "hydra.cc", "full_key"):
        assert noise not in err
    assert list(Path.cwd().iterdir()) == [], "no directory is left"


def test_a_mistake_in_a_file_names_the_file(capfd: pytest.CaptureFixture[str]):
    Path("mine/kv").mkdir(parents=True)
    Path("mine/kv/wrong.yaml").write_text("block_size: big\n")
    Path("mine/kv/unknown.yaml").write_text("blok_size: 1\n")
    Path("mine/kv/broken.yaml").write_text("a: [\n")
    for choice, says in {
        "wrong": "kv.block_size (in kv/wrong.yaml): must be an integer",
        "unknown": "kv.blok_size (in kv/unknown.yaml): no such key; did you mean kv.block_size?",
        "broken": "broken.yaml",
    }.items():
        assert launch(COMMAND, ["--config-dir", "mine", f"kv={choice}"]) == 2
        assert says in capfd.readouterr().err
    assert not Path("outputs").exists()


def test_a_secret_in_a_mistake_is_not_shown(capfd: pytest.CaptureFixture[str]):
    assert launch(COMMAND, ["+hf_token=sesame"]) == 2
    assert "sesame" not in capfd.readouterr().err


def test_a_log_level_variable_that_is_no_level_is_a_mistake_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "loud")
    assert launch(COMMAND, []) == 2
    assert "NANOVLLM_LOG_LEVEL=loud: must be one of DEBUG, INFO, WARNING, ERROR" in capfd.readouterr().err
    assert launch(COMMAND, ["log_level=INFO"]) == 0, "the config wins"


def test_a_real_process_says_it_on_stderr_and_leaves_nothing(tmp_path: Path):
    code, out, err = finish(start(tmp_path, "kv.block_size=0"))
    assert (code, out, err) == (2, "", "error: kv.block_size=0: must be an integer from 1 to 4096\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_directory_private_and_complete():
    umask = os.umask(0o022)
    try:
        assert launch(COMMAND, ["model=qwen3", "kv.block_size=32", "log_level=debug"]) == 0
        assert os.umask(0o022) == 0o022, "the caller's umask comes back"
    finally:
        os.umask(umask)
    path = only_run()
    assert path.name.endswith("_qwen3")
    assert {entry.name for entry in path.iterdir()} == {"manifest.json", ".hydra", "run.log", "lock"}
    for entry in (Path("outputs"), path, *path.rglob("*")):
        assert entry.stat().st_mode & 0o077 == 0, f"{entry} is private"
    content = json.loads((path / "manifest.json").read_text())
    assert (content["status"], content["exit_code"]) == ("complete", 0)
    assert (content["config"]["kv"]["block_size"], content["config"]["model"]["path"]) == (32, "Qwen/Qwen3-0.6B")
    assert content["command"][-3:] == ["model=qwen3", "kv.block_size=32", "log_level=debug"]
    assert content["counts"] == {"rows": 4}
    assert [phase["name"] for phase in content["attempts"][0]["phases"]] == ["load"]
    assert (path / ".hydra/overrides.yaml").read_text() == "- model=qwen3\n- kv.block_size=32\n- log_level=debug\n"
    assert "block_size: 32" in (path / ".hydra/config.yaml").read_text()
    assert "model: qwen3" in (path / ".hydra/hydra.yaml").read_text()


def test_rows_that_failed_are_exit_code_3_of_a_complete_run():
    assert launch(COMMAND, ["input=rows-failed"]) == 3
    content = json.loads((only_run() / "manifest.json").read_text())
    assert (content["status"], content["exit_code"]) == ("complete", 3)


def test_a_failed_run_has_its_traceback_in_its_log_and_one_line_on_the_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "open-sesame-please")
    assert launch(COMMAND, ["input=fail"]) == 1
    path, err = only_run(), capfd.readouterr().err
    assert err == f"error: the run failed: ValueError: the model fell over ***; traceback in {path}/run.log\n"
    log = (path / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "ValueError: the model fell over ***" in log
    content = json.loads((path / "manifest.json").read_text())
    assert (content["status"], content["exit_code"]) == ("failed", 1)
    assert content["error"] == "ValueError: the model fell over ***"


def test_a_run_that_cannot_start_in_a_directory_that_was_there_says_so_in_its_manifest(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    assert launch(COMMAND, ["input=cannot-start", "hydra.run.dir=mine"]) == 2
    content = json.loads(Path("mine/manifest.json").read_text())
    assert (content["status"], content["exit_code"]) == ("failed", 2)
    assert "no CUDA device" in content["error"]


def test_secrets_stay_out_of_every_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHERE_PROMPTS_ARE", "swordfish")
    monkeypatch.setenv("HF_TOKEN", "open-sesame-please")
    words = ["input=${oc.env:WHERE_PROMPTS_ARE}", "reader.system=${input}", "model.revision=open-sesame-please"]
    assert launch(COMMAND, words) == 0
    for path in only_run().rglob("*"):
        if path.is_file():
            assert "swordfish" not in path.read_text(), path
            assert "sesame" not in path.read_text(), path


def test_nothing_that_only_shows_imports_torch_or_creates_a_directory(tmp_path: Path):
    program = (
        "import sys\n"
        "from jobs.launch import launch\n"
        "from tests.jobs.standin import COMMAND\n"
        f"codes = [launch(COMMAND, words) for words in {SHOWING!r}]\n"
        "codes.append(launch(COMMAND, ['-sc', 'query=bash']))\n"
        "print('codes', codes, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "x recorder=", "COMP_POINT": "11"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "codes [0, 0, 0, 0, 0] False False"
    assert "python -m jobs.generate model=qwen3 input=prompts.jsonl" in done.stdout, "--help"
    assert "path: Qwen/Qwen3-0.6B" in done.stdout, "--cfg job --resolve model=qwen3"
    assert "generate_schema" in done.stdout, "--info defaults"
    assert {"recorder=on", "recorder=off"} <= set(done.stdout.splitlines()[-2].split()), "tab completion"
    assert list(tmp_path.iterdir()) == []


def test_config_dir_adds_choices_to_a_single_run():
    Path("mine/kv").mkdir(parents=True)
    Path("mine/kv/huge.yaml").write_text("block_size: 1024\n")
    assert launch(COMMAND, ["--config-dir", "mine", "kv=huge"]) == 0
    content = json.loads((only_run() / "manifest.json").read_text())
    assert content["config"]["kv"]["block_size"] == 1024


def test_overrides_may_stand_on_both_sides_of_a_flag():
    Path("mine").mkdir()
    assert launch(COMMAND, ["seed=1", "--config-dir", "mine", "kv.block_size=8"]) == 0
    config = json.loads((only_run() / "manifest.json").read_text())["config"]
    assert (config["seed"], config["kv"]["block_size"]) == (1, 8)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_run_between_two_steps(tmp_path: Path, signum: signal.Signals, code: int):
    process = start(tmp_path, "input=steps")
    path = wait_until_ready(process)
    process.send_signal(signum)
    ended, _, err = finish(process)
    assert ended == code
    assert "Traceback" not in err
    assert f"{signum.name}: stopped; what was finished is in outputs/" in err
    assert (path / "sealed").exists()
    (content,) = manifests(tmp_path).values()
    assert (content["status"], content["exit_code"]) == ("interrupted", code)


def test_a_signal_while_the_model_loads_ends_the_run_at_once(tmp_path: Path):
    process = start(tmp_path, "input=load")
    wait_until_ready(process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    (content,) = manifests(tmp_path).values()
    assert content["status"] == "interrupted"
    assert [phase["name"] for phase in content["attempts"][0]["phases"]] == ["load"]


def test_a_second_ctrl_c_does_not_wait_for_a_job_that_is_stuck(tmp_path: Path):
    process = start(tmp_path, "input=stuck")
    path = wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert (path / "sealed").exists(), "finally blocks run"
