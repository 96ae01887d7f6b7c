"""Many rows: a flat memory, thousands of rows a second, and the order of the input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.generate_process import ROOT

MIN_ROWS_PER_S = 2000
MAX_GROWTH_MB = 50.0


def played(directory: Path, num_rows: int, form: str, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.throughput_job", str(num_rows), str(directory), form, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(directory: Path) -> int:
    """How many there are, all in input order."""
    count = 0
    with open(directory / "run" / "generations.jsonl", "rb") as file:
        for count, line in enumerate(file, 1):
            assert line.startswith(b'{"row":%d,"sample":0,"id":"row-%d",' % (count - 1, count - 1))
    return count


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_many_rows_keep_their_order_and_the_memory_flat(form: str, tmp_path: Path):
    """The time is for the long form alone: here it would be that of a start, on a machine that runs other tests."""
    facts = played(tmp_path, 20_000, form, "recorder.flush_s=0.2")  # so that rows count soon, also in a short run
    assert rows_of(tmp_path) == 20_000
    assert facts["rss_after_first_mb"] > 0, "memory was watched from the first rows on"
    assert facts["growth_mb"] < MAX_GROWTH_MB


def test_arrow_takes_its_memory_from_the_allocator_of_the_process():
    """Its own ones keep what they have once used: up to 15 MB more after a million rows."""
    code = "import jobs.record_parts, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    given = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, cwd=ROOT, check=True)
    assert done.stdout == "system\n"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_a_million_rows(form: str, tmp_path: Path):
    facts = played(tmp_path, 1_000_000, form)
    print(json.dumps(facts))
    assert rows_of(tmp_path) == 1_000_000
    assert facts["rows_per_s"] >= MIN_ROWS_PER_S
    assert facts["growth_mb"] < MAX_GROWTH_MB
