"""Configurations that are simulated side by side: the same as one after the other, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from jobs.simulate import main
from jobs.simulation import workers as workers_module
from jobs.simulation.predictor import Predictor
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.simulator import simulate
from jobs.simulation.subject import Subject, decoded, encoded
from jobs.simulation.workers import MOST_BY_DEFAULT, MOST_WORKERS, Workers, workers_for
from jobs.usage import UsageError
from tests.jobs.generate_process import ROOT
from tests.jobs.synthetic_run import Row, write_run
from tests.jobs.test_simulate import LAW, SMALL

ROWS = [
    Row(num_prompt_tokens=70, num_output_tokens=30),
    *(
        Row(num_prompt_tokens=60 + i % 9, num_output_tokens=20 + i % 17, shared_prefix_row=0, shared_prefix_tokens=48)
        for i in range(80)
    ),
]
TIGHT = replace(SMALL, num_blocks=60, max_model_len=512)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "a run"
    write_run(directory, ROWS, LAW, TIGHT, on_gpu=True)
    return directory


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    predictor = Predictor(RecordedRun("run", run))
    return Subject(facts=predictor.run.facts, rows=predictor.rows, model=predictor.costs.model)


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2) as started:
        yield started
    assert all(process._process.returncode is not None for process in started._processes)


def test_outcomes_are_those_of_one_process(subject: Subject, workers: Workers):
    settings = [replace(TIGHT, block_size=size, max_num_seqs=seqs) for size in (4, 16, 32) for seqs in (3, 16)]
    found = workers.outcomes(subject, settings)
    assert sum(outcome.num_preemptions > 0 for outcome in found) >= 2
    assert sum(outcome.num_cached_tokens > 0 for outcome in found) >= 2
    for each, outcome in zip(settings, found, strict=True):
        alone = replace(simulate(subject.facts, subject.rows, subject.model, each), shared=[])
        first, second = asdict(outcome), asdict(alone)
        np.testing.assert_array_equal(first.pop("latencies_s"), second.pop("latencies_s"))
        assert first == second


@pytest.mark.parametrize("search", [False, True])
def test_the_command_says_the_same(run: Path, capsys: pytest.CaptureFixture[str], *, search: bool):
    words = [f"run={run}", "kv.block_size=4,16", "engine.max_num_seqs=8,9999999,16", f"search={str(search).lower()}"]
    said = []
    for count in (1, 3):
        assert main([*words, f"workers={count}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        said.append([line for line in lines if "simulated in" not in line])
        assert len(lines) == len(said[-1]) + 1
    assert said[0] == said[1]
    assert sum(line.startswith("kv.block_size") for line in said[0]) >= 6


def test_a_process_that_is_killed_is_one_error_with_a_cure(subject: Subject, workers: Workers):
    workers._processes[1]._process.kill()
    with pytest.raises(UsageError, match=r"ended by SIGKILL.*memory.*workers=1"):
        workers.outcomes(subject, [TIGHT] * 3)


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGTERM])
def test_a_process_that_dies_otherwise_is_no_lack_of_memory(subject: Subject, workers: Workers, signum: signal.Signals):
    workers._processes[0]._process.send_signal(signum)
    with pytest.raises(RuntimeError, match=f"ended with {signum.name}:") as caught:
        workers.outcomes(subject, [TIGHT] * 3)
    assert not isinstance(caught.value, UsageError)


def test_an_error_of_ours_is_raised_as_it_is(subject: Subject, workers: Workers, monkeypatch: pytest.MonkeyPatch):
    def decoded(*arguments: object) -> None:
        raise IndexError("a bug in decoding")

    monkeypatch.setattr("jobs.simulation.workers.decoded", decoded)
    with pytest.raises(IndexError, match="a bug in decoding"):
        workers.outcomes(subject, [TIGHT] * 3)


def test_processes_that_cannot_start_are_one_error_with_a_cure(monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        if len(started) == 2:
            raise OSError(24, "Too many open files")
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(workers_module, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    with pytest.raises(UsageError, match=r"3 processes.*Too many open files.*workers=1"):
        Workers(3)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_an_array_of_no_numbers_is_not_handed_over():
    good = decoded(encoded(np.array([0.1, 1e-300])), np.ndarray)
    assert good.tolist() == [0.1, 1e-300]
    with pytest.raises(msgspec.ValidationError, match="no number"):
        decoded(encoded(np.array([np.nan, 1.0])), np.ndarray)


def test_what_goes_wrong_in_a_process_is_told(workers: Workers):
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*FileNotFoundError.*no such directory"):
        workers._processes[0].load("/no such directory")


def test_a_disk_that_is_full_is_one_error_with_a_cure(
    subject: Subject, workers: Workers, monkeypatch: pytest.MonkeyPatch
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UsageError, match=r"No space left on device.*workers=1"):
        workers.outcomes(subject, [TIGHT])


def test_nothing_is_left_behind_in_the_temporary_directory(
    subject: Subject, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(workers.outcomes(subject, [TIGHT, TIGHT, TIGHT])) == 3
    assert list(tmp_path.iterdir()) == []


def test_processes_end_with_the_one_that_started_them():
    code = (
        "import time\n"
        "from jobs.simulation.workers import Workers\n"
        "workers = Workers(2)\n"
        "print(*[process._process.pid for process in workers._processes], flush=True)\n"
        "time.sleep(60)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    pids = [int(pid) for pid in command.stdout.readline().split()]
    command.kill()
    command.wait()
    command.stdout.close()
    assert len(pids) == 2
    until = time.monotonic() + 60
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def is_alive(pid: int) -> bool:
    """Nobody may have waited for it: then it is a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_control_c_ends_the_command_and_its_processes(run: Path):
    """Sent to the command alone, as its processes are in sessions of their own."""
    words = [f"run={run}", "kv.block_size=range(1,200)", "workers=2"]
    command = subprocess.Popen(
        [sys.executable, "-m", "jobs.simulate", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None
    command.stdout.readline()  # the fit: the grid has begun, or is about to
    children = children_of(command.pid)
    assert len(children) == 2
    time.sleep(0.3)
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    assert command.returncode != 0
    assert not [pid for pid in children if is_alive(pid)]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("configurations", "rows", "steps", "cores", "expected"),
    [
        (1, 10**6, 10**5, 16, 1),
        (4, 100, 100, 2, 1),
        (4, 4096, 137, 2, 1),  # which would have to get ready beside the fit
        (4, 4096, 137, 16, 4),
        (36, 4096, 137, 2, 2),
        (1000, 10**6, 10**5, 16, 16),
        (1000, 10**6, 10**5, 300, MOST_BY_DEFAULT),
    ],
)
def test_how_many_processes_a_grid_is_worth(
    configurations: int, rows: int, steps: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert workers_for(configurations, num_rows=rows, num_steps=steps) == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", str(MOST_WORKERS + 1)])
def test_a_number_of_processes_that_cannot_be(run: Path, value: str, capsys: pytest.CaptureFixture[str]):
    assert main([f"run={run}", f"workers={value}"]) == 2
    assert capsys.readouterr().err == f"error: workers={value}: must be a number of processes, 1 to {MOST_WORKERS}\n"


def test_runs_to_compare_with_are_simulated_in_one_process(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main([f"run={run}", f"against={run}", "workers=2"]) == 2
    assert capsys.readouterr().err.startswith("error: workers=2: has no place beside against=")


def test_a_process_imports_little():
    """It has to be ready when the costs are fitted."""
    code = "import sys, jobs.simulation.worker; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(said.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "pyarrow", "hydra", "omegaconf", "scipy", "transformers"}
