"""The workload benchmark: our engine, a peer that is kept apart, and what is refused."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from jobs import bench
from jobs.bench_config import BenchConfig, BenchEngineConfig, RoundsConfig
from jobs.bench_report import Round, StepTotals, WorkloadResult, table
from jobs.bench_rounds import EngineShelf
from jobs.command import CHECKOUT, CONF_DIR
from jobs.compose import ConfigSource, compose_config
from jobs.roofline import GPUS, NO_BOUND, Gpu
from jobs.workloads import WORKLOADS
from nanovllm.config import EngineConfig, KVConfig, LLMConfig, ModelConfig

SMALL = ["model=tiny", "bench.scale=0.02", "bench.rounds=1"]
FAKE_PEER = '''
"""Stands in for nano-vllm: a package of the same name as ours that notes what it is given and can see."""

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.0.fake"
HERE = Path(__file__).parent
LOG = HERE.parent / "seen.jsonl"


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool


class LLM:
    def __init__(self, path, **settings):
        print("a peer may print what it likes")
        visible = [name for name in ("jobs", "kernels", "tests") if find_spec(name) is not None]
        files = sorted(file.name for file in Path(path).iterdir())
        with LOG.open("a") as log:
            log.write(json.dumps({"path": sys.path, "visible": visible, "files": files, "settings": settings}) + "\\n")

    def generate(self, prompts, params, use_tqdm):
        assert all(p.ignore_eos for p in params) and not use_tqdm
        missing = int((HERE / "missing").read_text()) if (HERE / "missing").exists() else 0
        return [{"text": "", "token_ids": [1] * (p.max_tokens - missing)} for p in params]
'''


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A checkout of the fake peer."""
    package = tmp_path / "peer" / "nanovllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_PEER)
    return package.parent


def last_line(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def refusal(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that these words get."""
    assert bench.main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert not list(Path().iterdir()), "a refused run leaves nothing behind"
    return err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["workload=nano,mnay"], "error: workload=nano,mnay: must be one or more of nano, many, short, shared, long"),
        (["workload="], "workload=: must be one or more of nano, many"),
        (["workload=nano,,many"], "workload=nano,,many: must be"),
        (["workload=nano,nano"], "workload=nano,nano: must be one or more"),
        (["workload=nano;rm"], "workload=nano;rm: must be one or more"),
        (["workload=nano", "bench.rounds=0"], "bench.rounds=0: must be an integer of at least 1"),
        (["bench.scale=2"], "bench.scale=2.0: must be above 0 and at most 1"),
        (["bench.recorder=maybe"], "bench.recorder=maybe: must be one of on, off, both"),
        (["bench.peer=sglang", "path=."], "bench.peer=sglang: must be one of nano-vllm, mini-sglang, vllm"),
        (["bench.peer=nano-vllm"], "bench.peer=nano-vllm: needs path=DIR"),
        (["path=."], "path=.: is the checkout of bench.peer=NAME"),
        (["bench.peer=nano-vllm", "path=nowhere"], "path=nowhere: must be a directory"),
        (["bench.peer=mini-sglang", "path=/"], "path=/: holds no python/minisgl"),
        (["bench.peer=vllm", "kv.block_size=32"], "have no effect on a peer"),
        (["bench.peer=vllm", "bench.python=no-python"], "bench.python=no-python: must be a Python interpreter"),
        (["engine.max_num_seqs=0"], "engine.max_num_seqs=0: must be an integer from 1 to 65536"),
        (["workload=many", "engine.max_num_batched_tokens=9"], "must be at least engine.max_num_seqs=1024"),
        (["engine.max_model_len=100"], "engine.max_model_len=100: must be an integer from 2048 to"),
        (["workload=long", "model=tiny"], "workload=long: its longest sequence has 8704 tokens"),
        (["bench.round=3"], "bench.round=3: no such key; did you mean bench.rounds?"),
        (["model=qwen33"], "model=qwen33: no such choice"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], says: str, capfd: pytest.CaptureFixture[str]):
    assert says in refusal(words, capfd)


@pytest.mark.parametrize("words", [[], ["hots"], ["host", "kernels"]])
def test_a_word_that_is_no_benchmark_gets_the_list_of_them(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert bench.main(words) == 2
    err = capsys.readouterr().err
    assert "not " + (" ".join(words) or "nothing") in err
    assert all(name in err for name in [*bench.BENCHMARKS, *WORKLOADS])


def test_nothing_heavy_is_imported_before_the_words_are_checked():
    program = (
        "import sys; from jobs import bench; bench.main(['workload=nano', 'engine.max_model_len=100'])\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"


def test_the_engine_with_the_recorder_on_and_off_in_turn(capfd: pytest.CaptureFixture[str]):
    assert bench.main(["workload=nano,short", *SMALL, "bench.rounds=2", "device=cpu"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    report = last_line(out)
    assert [report[key] for key in ("benchmark", "engine", "device", "dtype")] == [
        "workloads",
        "nanovllm",
        "cpu",
        "float32",
    ]
    assert {"torch", "date", "git"} <= report.keys()
    assert list(report["workloads"]) == ["nano", "short"]
    for name, figures in report["workloads"].items():
        assert [r["recorder"] for r in figures["rounds"]] == [True, False, True, False]
        assert [r["seed"] for r in figures["rounds"]] == [2, 2, 3, 3], "the first seed warmed up"
        assert figures["recorder_on_over_off"] > 0
        assert figures["output_tok_s_best"] >= figures["output_tok_s"] > 0
        assert figures["cached_prompt_tokens"] == 0, "no round is answered from an earlier one's cache"
        assert figures["bound_tok_s"] is None
        assert figures["of_bound"] is None
        assert figures["steps"] >= 1
        assert 0 <= figures["device_idle"] < 1
        assert figures["settings"]["max_num_seqs"] == WORKLOADS[name].max_num_seqs
        assert name in out
    assert f"cpu: {NO_BOUND}" in out
    assert "short: counted in prompt and output tokens" in out
    (manifest,) = Path("outputs/bench").glob("*/*/manifest.json")
    assert json.loads(manifest.read_text())["benchmark"] == report


@pytest.mark.parametrize(("mode", "recorded"), [("on", True), ("off", False)])
def test_the_recorder_alone(mode: str, recorded: bool, capfd: pytest.CaptureFixture[str]):
    assert bench.main(["workload=many", *SMALL, f"bench.recorder={mode}", "bench.warmup=0", "device=cpu"]) == 0
    figures = last_line(capfd.readouterr().out)["workloads"]["many"]
    assert [(r["seed"], r["recorder"]) for r in figures["rounds"]] == [(1, recorded)]
    assert figures["recorder_on_over_off"] is None


def test_on_a_device_of_known_speed_there_is_a_bound(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(GPUS, "cpu", Gpu(bytes_per_s=1e10, flops_per_s=1e12))
    assert bench.main(["workload=shared,many", *SMALL, "bench.recorder=off", "device=cpu"]) == 0
    out = capfd.readouterr().out
    shared, many = last_line(out)["workloads"].values()
    for figures in (shared, many):
        (only,) = figures["rounds"]
        assert figures["of_bound"] == pytest.approx(only["bound_s"] / only["seconds"], rel=0.05)
    assert shared["cascade_bound_tok_s"] > shared["bound_tok_s"]
    assert many["cascade_bound_tok_s"] is None
    assert "shared: with the common prefix read once" in out
    assert NO_BOUND not in out


def test_a_peer_of_our_name_runs_apart_and_sees_nothing_of_ours(peer: Path, capfd: pytest.CaptureFixture[str]):
    assert bench.main(["workload=nano,many", *SMALL, "bench.peer=nano-vllm", f"path={peer}"]) == 0
    out, err = capfd.readouterr()
    report = last_line(out)
    assert report["engine"] == "nano-vllm"
    assert report["peer"]["package"] == str(peer / "nanovllm" / "__init__.py")
    assert report["peer"]["version"] == "0.0.fake"
    assert report["workloads"]["nano"]["output_tok_s"] > 0
    assert report["workloads"]["nano"]["steps"] is None
    assert [r["seed"] for r in report["workloads"]["many"]["rounds"]] == [2]
    assert "a peer may print" in err
    assert "a peer may print" not in out
    seen = [json.loads(line) for line in (peer / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2, "a process for each workload"
    for view in seen:
        assert view["visible"] == []
        assert str(CHECKOUT) not in view["path"]
        assert not any(entry.startswith(str(CHECKOUT / "jobs")) for entry in view["path"])
        assert view["files"] == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert seen[1]["settings"] == {
        "enforce_eager": False,
        "max_model_len": 256,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 8192,
    }


def test_a_peer_that_leaves_tokens_out_has_no_figures(peer: Path, capfd: pytest.CaptureFixture[str]):
    (peer / "nanovllm" / "missing").write_text("2")
    assert bench.main(["workload=many", *SMALL, "bench.peer=nano-vllm", f"path={peer}"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "gave 3 of 5 tokens for sequence 0" in err


def test_a_peer_that_fails_ends_the_run_and_is_named(peer: Path, capfd: pytest.CaptureFixture[str]):
    (peer / "nanovllm" / "__init__.py").write_text("raise ImportError('flash_attn is missing')")
    assert bench.main(["workload=many", *SMALL, "bench.peer=nano-vllm", f"path={peer}"]) == 1
    err = capfd.readouterr().err
    assert "flash_attn is missing" in err
    assert "bench.peer=nano-vllm: its process ended with exit code 1" in err


def test_an_engine_serves_as_long_as_its_settings_are_asked_for():
    def config(max_num_seqs: int) -> LLMConfig:
        engine = EngineConfig(max_num_seqs=max_num_seqs, max_model_len=64)
        return LLMConfig(model=ModelConfig(path="tiny"), engine=engine, kv=KVConfig(num_blocks=8), device="cpu")

    shelf = EngineShelf()
    first = shelf.engine(config(4))
    assert shelf.engine(config(4)) is first
    assert shelf.engine(config(5)) is not first


def test_the_figures_are_told_beside_the_bound():
    def done(seconds: float, recorder: bool) -> Round:
        steps = StepTotals(num_steps=10, host_ms=20.0, forward_ms=600.0, num_preemptions=1, num_cached_tokens=3)
        return Round(
            seed=1,
            seconds=seconds,
            num_prompt_tokens=1000,
            num_output_tokens=500,
            recorder=recorder,
            steps=steps,
            bound_s=0.5,
            cascade_bound_s=0.25,
        )

    rounds = [done(1.0, True), done(0.8, False)]
    result = WorkloadResult(name="shared", counts_input=False, settings={}, rounds=rounds)
    figures = result.facts()
    assert figures["output_tok_s"] == 500.0
    assert figures["bound_tok_s"] == 1000.0
    assert figures["of_bound"] == 0.5
    assert figures["cascade_of_bound"] == 0.25
    assert figures["recorder_on_over_off"] == 0.8
    assert figures["output_tok_s_recorder_off"] == 625.0
    assert figures["host_ms_per_step"] == 2.0
    assert figures["device_idle"] == 0.4
    shown = table([result], "NVIDIA H200")
    assert "50.0%" in shown
    assert "the bound is 2,000 tok/s, of which this is 25.0%" in shown
    assert NO_BOUND not in shown


def test_the_default_is_the_0_6b_shape_with_random_weights_and_the_workload_s_own_limits():
    source = ConfigSource(schema=BenchConfig, config_dir=CONF_DIR, config_name="bench")
    config = compose_config(source, []).config
    assert config.model == ModelConfig(path="Qwen/Qwen3-0.6B", load_format="dummy")
    assert config.bench == RoundsConfig()
    assert {name: config.engine.over(kind).max_num_seqs for name, kind in WORKLOADS.items()} == {
        "nano": 256,
        "many": 1024,
        "short": 1024,
        "shared": 1024,
        "long": 16,
    }
    chosen = compose_config(source, ["engine=low_latency"]).config
    assert chosen.engine.over(WORKLOADS["many"]) == EngineConfig(max_num_seqs=16, max_num_batched_tokens=2048)


def test_the_primary_file_sets_nothing_but_hydra():
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "bench.yaml"), resolve=False)
    assert set(content) == {"defaults", "hydra"}


def test_every_setting_of_the_engine_can_be_set_here_too():
    assert {f.name for f in fields(BenchEngineConfig)} == {f.name for f in fields(EngineConfig)}
