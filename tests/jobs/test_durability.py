"""What a run has acknowledged is never lost: kills, full disks, torn files, losses of power; and broken variants.

Each suite runs in a process of its own (crash_driver), where a run is a forked child of milliseconds. The scaled forms
take every so many-th case; the long forms, marked slow, take all of them and print their figures (pytest -s).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.durability_mutants import BY_NAME

ROOT = Path(__file__).resolve().parents[2]
QUICK_MUTANTS = (
    "acknowledged_before_the_sync",
    "no_sync_before_the_rename",
    "no_sync_of_directories",
    "manifest_in_place",
    "last_row_forgotten",
    "done_rows_not_skipped",
)


def suite(name: str, *words: str, timeout_s: float = 120) -> dict[str, Any]:
    """The figures of a suite in which every promise was kept."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.crash_driver", name, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}"
    print(name, *words, done.stdout.strip())
    return json.loads(done.stdout)


long = pytest.mark.slow


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=long)])
def test_a_kill_at_any_call_that_changes_the_disk_loses_nothing(stride: int):
    figures = suite("every_call", f"stride={stride}", timeout_s=1800)
    assert figures["calls"] > 100
    assert figures["cases"] >= 3 * figures["calls"] // stride
    assert figures["kills"] >= figures["cases"], "every case was killed at least once, most of the halves twice"
    assert figures["kills"] > 1.2 * figures["cases"]
    assert figures["acks_before_the_last_attempt"] > figures["cases"], "kills came when there was something to lose"


@pytest.mark.parametrize("num_kills", [8, pytest.param(120, marks=long)])
def test_kills_at_random_lose_nothing(num_kills: int):
    figures = suite("random_kills", f"num_kills={num_kills}", timeout_s=1800)
    assert figures["kills"] == num_kills
    assert figures["kills_after_an_acknowledgement"] > num_kills // 5
    assert figures["acks"] > 300


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=long)])
def test_a_full_or_broken_disk_ends_the_run_and_nothing_is_lost(stride: int):
    figures = suite("failing_disk", f"stride={stride}", timeout_s=1800)
    assert figures["cases"] >= 1.5 * (figures["calls"] // stride)
    assert figures["exit 1"] > figures["cases"] // 2
    assert figures["exit 1"] + figures.get("exit 2", 0) == figures["cases"], "never a success"
    assert figures["in a resumed run"] > figures["cases"] // 4
    assert figures["acks"] > figures["cases"], "disks failed when there was something to lose"


@pytest.mark.parametrize("stride", [199, pytest.param(7, marks=long)])
def test_a_torn_end_of_a_log_loses_nothing_before_it(stride: int):
    assert suite("torn_tails", f"stride={stride}", timeout_s=3600)["cases"] >= 12


@pytest.mark.parametrize("states", [450, pytest.param(12_000, marks=long)])
def test_a_loss_of_power_loses_nothing(states: int):
    figures = suite("power_loss", f"states={states}", timeout_s=1800)
    assert figures["states"] == states
    assert figures["operations"] > 200
    assert figures["resumed"] >= states // 60
    assert figures["acks"] > 5 * states


@pytest.mark.parametrize(
    "name", [name if name in QUICK_MUTANTS else pytest.param(name, marks=long) for name in BY_NAME]
)
def test_a_broken_variant_is_caught(name: str):
    """The negative control of the tests above."""
    assert suite("mutant", f"name={name}", timeout_s=900)["caught"], f"{name} was not caught"


def test_there_are_enough_broken_variants():
    assert len(QUICK_MUTANTS) >= 6
    assert set(QUICK_MUTANTS) < set(BY_NAME)
