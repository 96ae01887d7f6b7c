"""Golden runs, made once: nobody may change them."""

from pathlib import Path

import pytest

from tests.analysis.editing import Row, edit_manifest, rows_of, write_table
from tests.analysis.made_run import Shape, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Look-ahead, padded graphs, prefix hits, evictions, preemptions, prompts in chunks."""
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows step by step, as on a CPU."""
    return make_run(tmp_path_factory.mktemp("made") / "plain", Shape(lookahead=0, graphs=False))


@pytest.fixture(scope="session")
def resumed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed twice, then complete."""
    return make_run(tmp_path_factory.mktemp("made") / "resumed", stops_after=[41, 60])


@pytest.fixture(scope="session")
def unrecorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three attempts, of which the middle one ran with recorder=off and was stopped."""
    run = make_run(tmp_path_factory.mktemp("made") / "unrecorded", stops_after=[41, 60])
    middle = [step for step in rows_of(run, "steps") if step["attempt"] == 1]
    for table in ("steps", "block_events", "requests"):
        write_table(run, table, [row for row in rows_of(run, table) if row["attempt"] != 1])

    def stopped_without_records(manifest: Row) -> None:
        attempt = manifest["attempts"][1]
        generate = {"name": "generate", "start_ns": middle[0]["start_ns"], "end_ns": middle[-1]["end_ns"]}
        attempt["phases"].append(generate)
        attempt |= {"ended": attempt["started"], "status": "interrupted", "sealed": True}
        attempt |= {"recorder": False, "last_step": middle[-1]["step"]}

    edit_manifest(run, stopped_without_records)
    return run
