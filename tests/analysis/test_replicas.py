"""Several replicas of one run: each has its own blocks and step numbers, and its share of the time."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.analysis.audit import audit
from jobs.analysis.program import main
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from tests.analysis.editing import copied, edit, edit_answers, edit_manifest
from tests.analysis.made_run import Shape, make_run


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run of two replicas, and the two runs that it is made of; the second has the rows from 60 on."""
    folder = tmp_path_factory.mktemp("replicated")
    first, second = make_run(folder / "first"), make_run(folder / "second", Shape(seed=5))
    both = copied(first, folder / "both")
    for part in sorted(second.glob("records/*/*.parquet")):
        table = pq.read_table(part)
        changed = {"replica": pa.array([1] * table.num_rows, pa.int32())}
        if "row" in table.column_names:
            changed["row"] = pa.array([row + 60 for row in table["row"].to_pylist()], pa.int64())
        for name, column in changed.items():
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        pq.write_table(table, both / "records" / part.parent.name / part.name.replace("r0000", "r0001"))
    others = [json.loads(line) for line in (second / "generations.jsonl").read_text().splitlines()]
    edit_answers(both, lambda rows: rows.extend({**row, "row": row["row"] + 60} for row in others))
    edit_manifest(both, lambda manifest: manifest["counts"].update(rows=120, answered=120))
    return both, first, second


def test_replicas_are_audited_each_by_itself(replicated: tuple[Path, Path, Path], tmp_path: Path) -> None:
    both, *_ = replicated
    assert audit(both).first is None, str(audit(both))
    faulty = copied(both, tmp_path / "run")
    edit(faulty, "block_events", lambda rows: next(row for row in rows if row["replica"] == 1).update(free_blocks=7))
    first = audit(faulty).first
    assert first is not None
    assert first.replica == 1


def test_the_ledger_is_the_mean_of_the_replicas_and_counts_are_sums(replicated: tuple[Path, Path, Path]) -> None:
    both, first, second = (RunFigures.of(RecordedRun(path)) for path in replicated)
    for place in ("prefill", "decode", "padding"):
        assert both.ledger[place] == pytest.approx((first.ledger[place] + second.ledger[place]) / 2)
    assert both.num_steps == first.num_steps + second.num_steps
    assert both.num_sampled_tokens == first.num_sampled_tokens + second.num_sampled_tokens


def test_every_command_takes_a_run_of_replicas(
    replicated: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    both, first, _ = replicated
    assert main("analyze", [f"run={both}"]) == 0
    assert main("trace", [f"run={both}"]) == 0
    assert main("explain", [f"run={both}", "row=70"]) == 0
    assert main("diff", [f"a={both}", f"b={first}"]) == 1
    assert "row 70 (id-10)" in capsys.readouterr().out
