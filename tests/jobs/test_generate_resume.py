"""A real run, killed and stopped and resumed through the command line, comes to what an undisturbed one comes to."""

import json
import random
import signal
import subprocess
import time
from contextlib import chdir
from pathlib import Path

import pytest

from tests.engine.ledger import Ledger
from tests.jobs.generate_process import Finished, block_events, bundled_rows, generate, start, write_rows

WORDS = (
    "input=rows.jsonl",
    "progress=off",
    "log_level=WARNING",
    "engine.max_num_seqs=4",
    "kv.num_blocks=64",
    "recorder.flush_s=0.1",
    "sampling.max_tokens=40",
    "sampling.ignore_eos=true",
    "sampling.temperature=1",
)
NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an input of good and bad rows, and `whole`, the undisturbed run of it."""
    directory = tmp_path_factory.mktemp("resume")
    rows = bundled_rows(40)
    rows[7] = {"id": "bad"}
    rows[31] = {"prompt": ""}
    write_rows(directory / "rows.jsonl", rows)
    with chdir(directory):
        assert generate(directory / "whole", *WORDS).code == 3
    return directory


def wait_for_another_row(directory: Path, process: subprocess.Popen[str]) -> None:
    partial = directory / "generations.partial.jsonl"
    before = partial.read_bytes().count(b"\n") if partial.exists() else 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > before:
            return
        time.sleep(0.01)
    raise AssertionError(f"no further row was acknowledged: {process.poll()}, {process.communicate()}")


def test_killed_and_stopped_and_resumed_it_comes_to_the_same_bytes(place: Path):
    run = Finished(place / "run", -1)
    words: list[str] = [*WORDS, "hydra.run.dir=run"]
    endings = [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)]
    for number, (signum, code) in enumerate(endings):
        process = start(place, *words)
        try:
            wait_for(run.directory / "manifest.json", process, number)
            wait_for_another_row(run.directory, process)
            began = time.monotonic()
            process.send_signal(signum)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
        if process.returncode == 3:
            pytest.fail("the run was over before the signal came; give it more rows")
        assert process.returncode == code, err
        assert time.monotonic() - began < 10
        if signum != signal.SIGKILL:
            assert err == f"error: {signum.name}: stopped; what was finished is in run; to go on: {RESUME}\n"
        words = ["resume=run"]
    process = start(place, "resume=run")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    check_the_end(run, Finished(place / "whole", 3), [code for _, code in endings])
    process = start(place, "resume=run")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (3, "")
    assert "complete, 38 answered, 2 failed; files verified" in out


RESUME = "python -m jobs.generate resume=run"


def check_the_end(run: Finished, whole: Finished, codes: list[int]) -> None:
    for name in ("generations.jsonl", "failures.jsonl"):
        assert (run.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    manifest = run.manifest
    assert (manifest["status"], manifest["exit_code"]) == ("complete", 3)
    statuses = {-9: ("killed", None), 130: ("interrupted", 130), 143: ("interrupted", 143)}
    found = [(attempt["status"], attempt["exit_code"]) for attempt in manifest["attempts"]]
    assert found == [*(statuses[code] for code in codes), ("complete", 3)]
    steps = run.table("steps")
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert {step["attempt"] for step in steps} == set(range(len(codes) + 1))
    assert sum(len(json.loads(line)["token_ids"]) for line in run.generations_bytes.splitlines()) == 38 * 40
    last = len(codes)
    for attempt in range(last + 1):
        check_the_ledger(run, attempt, {step["step"]: step for step in steps if step["attempt"] == attempt})


def check_the_ledger(run: Finished, attempt: int, steps: dict[int, dict]) -> None:
    """Block state begins empty at each attempt, and agrees with its steps."""
    rows = [row["attempt"] for row in run.table("block_events")]
    events = [event for event, of in zip(block_events(run.directory), rows, strict=True) if of == attempt]
    ledger, ends = Ledger(NUM_BLOCKS), {}
    for step, event in events:
        ledger.apply(event)
        ends[step] = ledger.free_blocks
    both = ends.keys() & steps.keys()
    assert both
    aborted_behind = max(ends)  # what is given up when an attempt stops, is given back behind its last step
    assert {s: ends[s] for s in both if s < aborted_behind} == {
        s: steps[s]["free_blocks"] for s in both if s < aborted_behind
    }


def test_while_a_run_goes_on_nobody_else_may_write_it(place: Path):
    process = start(place, *WORDS, "hydra.run.dir=held")
    try:
        wait_for(place / "held/manifest.json", process, 0)
        for words, says in ((["resume=held"], "is writing this run"), ([*WORDS, "hydra.run.dir=held"], "holds a run")):
            second = start(place, *words)
            _, err = second.communicate(timeout=30)
            assert second.returncode == 2, err
            assert says in err
        assert process.poll() is None, "the run was over before anybody else came"
        _, err = process.communicate(timeout=60)
        assert process.returncode == 3, err
    finally:
        process.kill()
    files = [(place / name / "generations.jsonl").read_bytes() for name in ("held", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_signals_at_random_end_within_ten_seconds_and_leave_a_run_to_go_on_with(rounds: int, place: Path):
    rng = random.Random(5)
    run = Finished(place / f"signals-{rounds}", -1)
    words = [*WORDS, "input=many.jsonl", f"hydra.run.dir={run.directory.name}"]
    write_rows(place / "many.jsonl", bundled_rows(200) * rounds)
    codes = []
    for number in range(rounds):
        process = start(place, *words)
        wait_for(run.directory / "manifest.json", process, number)
        time.sleep(rng.uniform(0.0, 4.0))
        signum, code = rng.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
        twice = rng.random() < 0.5
        began = time.monotonic()
        process.send_signal(signum)
        if twice:
            time.sleep(rng.uniform(0.0, 0.3))
            process.send_signal(signum)
        _, err = process.communicate(timeout=30)
        # A second one that comes when all is over meets the interpreter on its way out; a shell shows the same code.
        assert process.returncode == code or (twice and process.returncode == -signum), err
        assert time.monotonic() - began < 10
        # While a model loads, one may come in a library's __del__, where Python prints and swallows what it raises.
        assert "Exception ignored" in err or "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: SIG")
        assert run.manifest["status"] == "interrupted"
        assert [str(path) for path in run.directory.rglob("*.tmp")] == []
        codes.append(code)
        words = [f"resume={run.directory.name}"]
    assert [attempt["exit_code"] for attempt in run.manifest["attempts"]] == codes


def wait_for(path: Path, process: subprocess.Popen[str], attempt: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(json.loads(path.read_bytes())["attempts"]) > attempt:
            return
        time.sleep(0.02)
    raise AssertionError(f"the attempt never began: {process.communicate()}")
