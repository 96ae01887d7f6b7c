"""One process writes a run; its lock goes with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.run_lock import Locked, RunLock, is_locked

HOLDER = """
import sys, time
from pathlib import Path
from jobs.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


CHILD = """
import subprocess
child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
time.sleep(0.2)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_whether_a_run_is_locked_can_be_asked(tmp_path: Path):
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path)
    assert is_locked(tmp_path)
    lock.release()
    assert not is_locked(tmp_path)
    RunLock(tmp_path).release()


def test_a_second_lock_is_refused_until_the_first_is_given_back(tmp_path: Path):
    first = RunLock(tmp_path)
    began = time.monotonic()
    with pytest.raises(Locked, match="another process is writing this run"):
        RunLock(tmp_path)
    assert time.monotonic() - began < 1
    first.release()
    first.release()
    RunLock(tmp_path).release()
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_lock_ends_with_a_killed_process(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Locked):
            RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunLock(tmp_path).release()


def test_a_lock_where_no_run_began_is_taken_away_again(tmp_path: Path):
    RunLock(tmp_path).release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_runs_another_program_does_not_hold_the_lock(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{HOLDER.replace('time.sleep(60)', CHILD)}", str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        child = int(holder.stdout.readline())
        holder.kill()
        holder.wait()
        RunLock(tmp_path).release()
        os.kill(child, signal.SIGKILL)
