"""dry_run=true: says what a run would say of its rows, and leaves nothing."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from jobs.config import GenerateConfig
from jobs.dry_run import CPU_CACHE_BYTES
from jobs.earlier_runs import RECENT, EarlierRun, similar_run
from jobs.generate_job import COMMAND
from jobs.launch import launch
from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.runner import kv_cache
from tests.checkpoints import write_checkpoint
from tests.jobs.generate_process import ROOT, Row, bundled_rows, generate, write_rows
from tests.jobs.test_generate_bad_rows import BAD, SETTINGS


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def found(num_rows: int, on_cpu: bool = True) -> EarlierRun | None:
    config = GenerateConfig(model=ModelConfig(path="tiny"))
    return similar_run(config, "tiny", num_rows, on_cpu=on_cpu)


def write_manifest(directory: str, minute: int, num_rows: int, **changes: object) -> None:
    """Of a run that began at this minute; written in the order of the calls."""
    path = Path("outputs", directory, "manifest.json")
    path.parent.mkdir(parents=True)
    content = {
        "status": "complete",
        "clock_zero": f"2026-11-24T08:{minute:02d}:00+00:00",
        "config": asdict(GenerateConfig(model=ModelConfig(path="tiny"))),
        "device": "cpu",
        "attempts": [{}],
        "counts": {"answered": num_rows},
        "figures": {"seconds": 1.0, "num_prompt_tokens": 9 * num_rows, "num_output_tokens": 5 * num_rows},
    }
    path.write_text(json.dumps(content | changes))


def lines_of(out: str) -> dict[str, str]:
    return {line[:14].strip(): line[15:] for line in out.splitlines() if line[:14].strip()}


def test_a_dry_run_tells_every_bad_row_as_the_run_does(cwd: Path, capsys: pytest.CaptureFixture[str]):
    lines: list[Row | bytes] = [*bundled_rows(10), *(bad.line for bad in BAD.values())]
    path = write_rows(cwd.parent / "rows.jsonl", lines)
    assert launch(COMMAND, ["dry_run=true", f"input={path}", *SETTINGS]) == 3
    out = capsys.readouterr().out
    assert list(cwd.iterdir()) == []
    run = generate(cwd.parent / "run", f"input={path}", *SETTINGS)
    told = lines_of(out)
    assert told["rows"] == f"{len(run.generations)} can be answered, {len(run.failures)} cannot"
    codes = run.manifest["counts"]["failed_by_code"]
    assert told["failures"] == ", ".join(f"{code} {count}" for code, count in codes.items())
    for failure in run.failures[:20]:
        shown = failure["reason"].encode("unicode_escape").decode()
        assert f"line {failure['line']}: {failure['code']}: " in out
        assert failure["reason"] in out or shown in out
    assert f"and {len(run.failures) - 20} more" in out
    prompts = [row["num_prompt_tokens"] for row in run.generations]
    assert told["prompts"].startswith(f"{sum(prompts):,} tokens; shortest {min(prompts)}, median ")
    assert told["prompts"].endswith(f"longest {max(prompts)}")


def test_the_need_of_the_cache_is_that_of_the_longest_rows(cwd: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt_token_ids": [5] * 33, "sampling": {"max_tokens": count}} for count in (16, 17, 100, 1)]
    path = write_rows(cwd.parent / "rows.jsonl", rows)
    words = [f"input={path}", "kv.num_blocks=11", "engine.max_num_seqs=2", "engine.max_num_batched_tokens=64"]
    assert launch(COMMAND, ["dry_run=true", *words]) == 0
    out = capsys.readouterr().out
    assert "the longest row needs up to 9" in out, "of 33 + 100 tokens, the last one without KV"
    assert "2 rows at once need up to 13 (0.00 GB); the cache has 11, so fewer may run at once" in out
    assert "134 tokens at most" in out
    assert generate(cwd.parent / "run", *words).code == 0
    assert launch(COMMAND, ["dry_run=true", *words[:1], "kv.num_blocks=8"]) == 3
    assert "exceeds_kv_cache" in capsys.readouterr().out


def test_repeated_ids_are_information_and_equal_text_and_number_are_two_ids(cwd: Path, capsys):
    rows = [{"prompt": "x", "id": id} for id in (1, "1", "a", "a", "a", "b")]
    path = write_rows(cwd.parent / "rows.jsonl", rows)
    assert launch(COMMAND, ["dry_run=true", f"input={path}"]) == 0
    assert lines_of(capsys.readouterr().out)["ids"].startswith("2 rows repeat an earlier row's id; that is legal")


def test_a_kept_column_that_no_row_has_is_seen_before_the_run(cwd: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": "x", "note": note} for note in (1, None, "a")] + [{"prompt": ""}]
    path = write_rows(cwd.parent / "rows.jsonl", rows)
    assert launch(COMMAND, ["dry_run=true", f"input={path}", "writer.keep=[note,nota]"]) == 3
    assert (
        lines_of(capsys.readouterr().out)["kept"] == "note in 2 of the rows, nota in 0 of the rows; null in the others"
    )


def test_the_time_is_told_from_a_complete_run_of_the_model(cwd: Path, capsys: pytest.CaptureFixture[str]):
    path = write_rows(cwd.parent / "rows.jsonl", bundled_rows(4))
    words = [f"input={path}", "sampling.max_tokens=8", "sampling.ignore_eos=true"]
    assert launch(COMMAND, ["dry_run=true", *words]) == 0
    assert "unknown: no complete run" in capsys.readouterr().out
    assert launch(COMMAND, ["progress=off", *words]) == 0
    capsys.readouterr()
    (directory,) = Path("outputs").glob("*/*")
    run = found(num_rows=4)
    assert run is not None
    assert (run.directory, run.output_tokens_per_row) == (directory, 8.0)
    assert launch(COMMAND, ["dry_run=true", *words]) == 0
    told = lines_of(capsys.readouterr().out)["time"]
    assert told.startswith(f"about {run.seconds:.0f} s of steps")
    assert f"{directory} (4 rows, 32 output tokens, 8 a row, cpu)" in told
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"status": "failed"}))
    assert found(num_rows=4) is None
    (directory / "manifest.json").write_text("{")
    assert found(num_rows=4) is None


def test_the_run_that_is_most_like_it_tells_the_time(cwd: Path):
    def directory(num_rows: int, on_cpu: bool = True) -> str | None:
        run = found(num_rows, on_cpu)
        return None if run is None else str(run.directory.relative_to("outputs"))

    other = asdict(GenerateConfig(model=ModelConfig(path="tiny"), engine=EngineConfig(max_num_seqs=255)))
    write_manifest("2026-11-24/large", 5, 300)
    write_manifest("2026-11-24/larger", 6, 400)
    write_manifest("multirun/2026-11-24/10-00/0", 1, 350)
    write_manifest("2026-11-24/tiny", 9, 2)
    write_manifest("2026-11-24/other", 7, 9000, config=other)
    write_manifest("2026-11-24/resumed", 7, 9000, attempts=[{}, {}])
    write_manifest("2026-11-24/failed", 7, 9000, status="failed")
    write_manifest("2026-11-24/gpu", 7, 9000, device="NVIDIA H100")
    assert directory(300) == directory(10_000) == directory(128) == "2026-11-24/larger"
    assert directory(300, on_cpu=False) == "2026-11-24/gpu"
    assert directory(2) == directory(4) == "2026-11-24/tiny"
    assert directory(5) is directory(50) is None, "neither 2 rows at once nor 256 tell of 50"
    for minute in range(10, 10 + RECENT):
        write_manifest(f"multirun/2026-11-24/11-00/{minute}", minute, 200 + minute)
    write_manifest("multirun/2026-11-24/12-00/0", 0, 9000)
    assert directory(300) == f"multirun/2026-11-24/11-00/{9 + RECENT}", "of the latest ones, by when they began"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["input=nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["model.path=./nowhere"], 2, "./nowhere"),
        (["dry_run=perhaps"], 2, "dry_run=perhaps"),
        (["-m", "seed=1,2"], 2, "dry_run=true: is for one run; leave -m out"),
        (["reader.max_failures=0"], 1, "more than reader.max_failures=0 rows are bad"),
    ],
)
def test_what_the_run_would_not_do_the_dry_run_does_not(words: list[str], code: int, says: str, cwd: Path, capfd):
    path = write_rows(cwd.parent / "rows.jsonl", [{"prompt": "x"}, {}])
    assert launch(COMMAND, [f"input={path}", "dry_run=true", *words]) == code
    assert says in capfd.readouterr().err
    assert list(cwd.iterdir()) == []


def test_a_run_is_not_resumed_dry(cwd: Path, capfd: pytest.CaptureFixture[str]):
    run = generate(cwd / "run", "reader.limit=1")
    assert launch(COMMAND, [f"resume={run.directory}", "dry_run=true"]) == 2
    assert "dry_run=true: has no effect with resume=" in capfd.readouterr().err


def test_no_weight_is_read_and_no_device_asked(cwd: Path):
    """A checkpoint whose weights are not there (dummy), on a device that is not there."""
    model = cwd.parent / "model"
    write_checkpoint(model, tokenizer=True)
    (model / "model.safetensors").unlink()
    path = write_rows(cwd.parent / "rows.jsonl", [{"prompt": "a\x1b[31m"}, {"messages": [{"role": "\x1b[31m"}]}])
    script = (
        "import sys\nfrom jobs.program import main\ncode = main('jobs.generate_job')\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
        "assert 'nanovllm.assembly' not in sys.modules\nsys.exit(code)"
    )
    words = ["dry_run=true", f"input={path}", f"model.path={model}", "model.load_format=dummy", "device=cuda"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "the cache will fill the GPU's memory" in done.stdout
    assert "\x1b" not in done.stdout
    assert list(cwd.iterdir()) == []


def test_the_size_of_a_cpus_cache_is_the_engines_own():
    assert CPU_CACHE_BYTES == kv_cache.CPU_CACHE_BYTES
