"""G06: a loop that makes no progress ends with its state and its stacks, also where it keeps the interpreter lock."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.watchdog import Watchdog
from tests.jobs.generate_process import ROOT, Finished, bundled_rows, json_lines, start, write_rows

LIMIT_S = 0.8
LOOP = f"""
import ctypes, sys, time
from pathlib import Path
from jobs.watchdog import Watchdog

directory = Path(sys.argv[1])
told = directory / "told"
with Watchdog({LIMIT_S}, directory / "run.log", lambda: "3 running, 4 waiting", told.write_text) as watchdog:
    for _ in range(20):
        time.sleep(0.02)
        watchdog.beats += 1
    print("STALLS", flush=True)
    HERE
print("SURVIVED", flush=True)
"""
STALLS = {
    "a loop in Python": "while True: pass",
    "a call that gives the lock away": "time.sleep(60)",
    "a call in C that keeps the lock": "ctypes.PyDLL(None).sleep(60)",
    "a lock that nobody gives back": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "the lock of logging": "import logging; logging._lock.acquire(); time.sleep(60)",
}


def begin(directory: Path, here: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.replace("HERE", here), str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "STALLS\n"
    return process


@pytest.mark.parametrize("name", STALLS)
def test_a_stall_ends_the_process_with_state_and_stacks(name: str, tmp_path: Path):
    process = begin(tmp_path, STALLS[name])
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert time.monotonic() - began < 20 * LIMIT_S
    log = (tmp_path / "run.log").read_text()
    assert 'File "<string>", line 13' in log, "the stack shows where the main thread is"
    if "in C" not in name:
        assert "no progress for 0.8 s (watchdog_s)" in log
        assert "3 running, 4 waiting" in log
        assert (tmp_path / "told").read_text() == "no progress for 0.8 s (watchdog_s)"
        assert f"state and stacks are in {tmp_path / 'run.log'}" in err
    else:
        assert not (tmp_path / "told").exists(), "no Python could run"


def test_a_loop_that_beats_goes_on(tmp_path: Path):
    process = begin(tmp_path, f"for _ in range(20): time.sleep({LIMIT_S} / 4); watchdog.beats += 1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "SURVIVED\n", "")


@pytest.mark.parametrize("suspend", [signal.SIGTSTP, signal.SIGSTOP])
def test_a_process_that_was_suspended_goes_on(suspend: int, tmp_path: Path):
    """Shorter than the last resort's time, which a stop from outside (not Ctrl-Z) does not stop."""
    process = begin(tmp_path, f"for _ in range(60): time.sleep({LIMIT_S} / 40); watchdog.beats += 1")
    time.sleep(LIMIT_S / 4)
    process.send_signal(suspend)
    time.sleep(3 * LIMIT_S if suspend == signal.SIGTSTP else LIMIT_S)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "SURVIVED\n", "")


def test_no_limit_no_watch(tmp_path: Path):
    with Watchdog(0, tmp_path / "run.log", str, str):
        time.sleep(0.1)
    assert not (tmp_path / "run.log").exists()


# In a job

JOB = """
import ctypes, sys, time
from pathlib import Path
from nanovllm.runner.model_runner import ModelRunner

original, calls = ModelRunner.collect, iter(range(1000))

def collect(self):
    if next(calls) == 12:
        while not any(log.stat().st_size for log in Path().glob("outputs/*/*/generations.partial.jsonl")):
            time.sleep(0.05)  # what has been finished is on the disk
        HERE
    return original(self)

ModelRunner.collect = collect
from jobs.program import main
sys.exit(main("jobs.generate_job"))
"""


@pytest.mark.parametrize("name", ["a call that gives the lock away", "a call in C that keeps the lock"])
def test_a_job_that_hangs_is_failed_says_where_and_can_be_resumed(name: str, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", bundled_rows(12))
    words = (f"input={path}", "watchdog_s=4", "sampling.temperature=0", "recorder.flush_s=0.2")
    process = subprocess.Popen(
        [sys.executable, "-c", JOB.replace("HERE", STALLS[name]), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, err = process.communicate(timeout=120)
    (directory,) = tmp_path.glob("outputs/*/*")
    run = Finished(directory, process.returncode)
    assert run.code == 1, err
    assert "in collect" in run.log, "the stacks"
    if name == "a call that gives the lock away":
        assert "KV blocks free" in run.log, "the state"
        assert (run.manifest["status"], run.manifest["exit_code"]) == ("failed", 1)
        assert run.manifest["error"] == "no progress for 4 s (watchdog_s)"
    answered = json_lines_of_log(directory / "generations.partial.jsonl")
    assert 0 < len(answered) < 12
    again = start(tmp_path, f"resume={directory}")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert len(json_lines(directory / "generations.jsonl")) == 12
    kept = {row["row"]: row["token_ids"] for row in json_lines(directory / "generations.jsonl")}
    assert all(kept[row["row"]] == row["token_ids"] for row in answered)


def test_a_silent_pipe_is_no_hang(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.generate", "input=-", "watchdog_s=0.5", "sampling.max_tokens=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write('{"prompt": "a"}\n')
    process.stdin.flush()
    partial = wait_for(lambda: next(tmp_path.glob("outputs/*/*/manifest.json"), None))
    wait_for(lambda: partial.parent.joinpath("progress.json").exists() or None)
    time.sleep(2.0)
    _, err = process.communicate('{"prompt": "b"}\n', timeout=60)
    assert process.returncode == 0, err
    assert len(json_lines(partial.parent / "generations.jsonl")) == 2


def wait_for(condition, patience_s: float = 60):
    deadline = time.monotonic() + patience_s
    while (found := condition()) is None:
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def json_lines_of_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
