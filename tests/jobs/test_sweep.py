"""Sweeps: a process and a directory for each job, whatever becomes of the others."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from jobs.command import CONF_DIR
from jobs.complaints import quoted
from jobs.compose import ConfigSource, compose_config, plan_sweep
from jobs.config import GenerateConfig
from jobs.masking import Masker
from jobs.run_dir import ALLOWED_NAME
from jobs.sweep import expand
from jobs.sweep_job import Job
from tests.jobs.standin_process import finish, manifests, start, wait_until_ready

SOURCE = ConfigSource(schema=GenerateConfig, config_dir=CONF_DIR, config_name="generate")
NASTY = [
    "a=b",
    "a,b",
    "a b",
    " a ",
    "it's",
    'say "hi"',
    "back\\slash",
    "ends in \\",
    '\\"',
    "</s>",
    "{text}",
    "[x]",
    "(y)",
    "a:b",
    "#1",
    "é日本🙂",
    "null",
    "true",
    "12",
    "$HOME",
    "${nowhere}",
    "\\${nowhere}",
    "100%",
    "tab\there",
    "two\nlines",
    "~+-",
    "*?",
]


def jobs_of(*overrides: str) -> list[Job]:
    return list(expand(plan_sweep(SOURCE, overrides).overrides))


def test_every_combination_is_a_job_and_the_last_sweep_changes_fastest():
    jobs = jobs_of("seed=1,2", "device=cpu", "kv.block_size=range(1,3)")
    assert [job.overrides for job in jobs] == [
        ["seed=1", "device=cpu", "kv.block_size=1"],
        ["seed=1", "device=cpu", "kv.block_size=2"],
        ["seed=2", "device=cpu", "kv.block_size=1"],
        ["seed=2", "device=cpu", "kv.block_size=2"],
    ]
    assert jobs[0].swept == ["seed=1", "kv.block_size=1"]


def test_groups_can_be_swept_by_glob():
    assert [job.swept for job in jobs_of("sampling=glob(*)")] == [
        ["sampling=creative"],
        ["sampling=greedy"],
        ["sampling=precise"],
    ]


def test_the_last_override_of_a_key_counts():
    assert [job.overrides for job in jobs_of("seed=1,2", "seed=3")] == [["seed=3"]]


def test_swept_values_reach_their_jobs_unchanged():
    jobs = jobs_of(f"reader.system={','.join(map(quoted, NASTY))}")
    assert [compose_config(SOURCE, job.overrides).config.reader.system for job in jobs] == NASTY


def test_an_unquoted_swept_value_means_in_its_job_what_it_means_alone():
    values = ["a/b.jsonl", "a b", "50%", "x@y", "2e3", "1_000", "@/dev"]
    for value, job in zip(values, jobs_of(f"reader.system={','.join(values)}"), strict=True):
        alone = compose_config(SOURCE, [f"reader.system={value}"]).config.reader.system
        assert compose_config(SOURCE, job.overrides).config.reader.system == alone


def test_lists_can_be_swept():
    jobs = jobs_of('sampling.stop=["</s>","a,b"],[c]')
    assert [compose_config(SOURCE, job.overrides).config.sampling.stop for job in jobs] == [["</s>", "a,b"], ["c"]]


@pytest.mark.parametrize("value", [*NASTY, "x" * 500, "/etc/passwd", "../.."])
def test_directory_names_are_allowed_and_differ(value: str):
    words = [[f"reader.system={quoted(text)}"] for text in (value, f"{value}=")]
    names = [Job(overrides=word, swept=word).directory_name(Masker({})) for word in words]
    assert all(ALLOWED_NAME.fullmatch(name) for name in names)
    assert len(set(names)) == 2


def test_directory_names_say_what_was_swept():
    (first, _) = jobs_of("kv.block_size=16,64", "model=qwen3")
    name = first.directory_name(Masker({}))
    assert name.startswith("kv.block_size-16_")
    assert "model" not in name


def test_no_job_keeps_the_others_from_running(tmp_path: Path):
    words = ("-m", "input=a,fail,crash,kill,cannot-start,missing,rows-failed,b", "hydra.sweep.dir=sweep")
    code, out, err = finish(start(tmp_path, *words))
    assert code == 1, err
    assert "exit codes 0 1 7 137 2 2 3 0" in out
    runs = {
        content["config"]["input"] if content["config"] else "missing": (path, content)
        for path, content in manifests(tmp_path).items()
    }
    ends = {name: (content["status"], content["exit_code"]) for name, (_, content) in runs.items()}
    assert ends == {
        "a": ("complete", 0),
        "fail": ("failed", 1),
        "crash": ("failed", 7),
        "kill": ("failed", 137),
        "cannot-start": ("failed", 2),
        "missing": ("failed", 2),
        "rows-failed": ("complete", 3),
        "b": ("complete", 0),
    }
    logs = {name: (path / "run.log").read_text() for name, (path, _) in runs.items()}
    assert "Traceback" in logs["fail"]
    assert "the model fell over" in logs["fail"]
    assert "SIGKILL" in logs["kill"]
    assert "exit code 7" in logs["crash"]
    assert "input=missing: no such file" in logs["missing"]
    assert "no CUDA device" in logs["cannot-start"]
    assert sum("Traceback" in log for log in logs.values()) == 1, "each log holds its own job's traceback only"


def test_a_value_out_of_range_stops_its_own_job_only(tmp_path: Path):
    code, _, err = finish(start(tmp_path, "-m", "kv.block_size=0,16"))
    assert code == 2
    assert "kv.block_size=0: must be an integer from 1 to 4096" in err
    ends = {path.name.rpartition("_")[0]: content["status"] for path, content in manifests(tmp_path).items()}
    assert ends == {"kv.block_size-0": "failed", "kv.block_size-16": "complete"}


def test_the_default_directory_is_below_outputs_multirun(tmp_path: Path):
    first, second = start(tmp_path, "-m", "seed=1"), start(tmp_path, "-m", "seed=1")
    assert (finish(first)[0], finish(second)[0]) == (0, 0)
    runs = list(manifests(tmp_path))
    assert len(runs) == 2
    for path in runs:
        assert path.relative_to(tmp_path).parts[:2] == ("outputs", "multirun")
        assert all(ALLOWED_NAME.fullmatch(part) for part in path.relative_to(tmp_path).parts)


def test_a_chosen_sweep_directory_that_is_in_use_is_refused(tmp_path: Path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/something").touch()
    code, _, err = finish(start(tmp_path, "-m", "seed=1,2", "hydra.sweep.dir=sweep"))
    assert code == 2
    assert "is not empty" in err


def test_a_config_file_can_ask_for_a_sweep_and_jobs_find_config_dir(tmp_path: Path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/blocks.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      kv.block_size: 8,32\n"
    )
    code, _, err = finish(start(tmp_path, "-m", "--config-dir", "mine", "experiment=blocks"))
    assert code == 0, err
    assert sorted(c["config"]["kv"]["block_size"] for c in manifests(tmp_path).values()) == [8, 32]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_seals_the_running_job_and_ends_the_sweep(tmp_path: Path, signum: signal.Signals, code: int):
    process = start(tmp_path, "-m", "input=steps,a")
    path = wait_until_ready(process)
    process.send_signal(signum)
    assert finish(process)[0] == code
    assert (path / "sealed").exists()
    (content,) = manifests(tmp_path).values()
    assert (content["status"], content["exit_code"]) == ("interrupted", code)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_sweep_that_is_killed_takes_its_job_with_it(tmp_path: Path):
    process = start(tmp_path, "-m", "input=steps,a")
    path = wait_until_ready(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while json.loads((path / "manifest.json").read_text())["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads((path / "manifest.json").read_text())["exit_code"] == 143
    process.communicate()
