"""What a run's two logs know together, and the checks before and after its final files."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.line_index import RowLogError
from jobs.results import Results, ResultsError
from jobs.rows import InputRow
from tests.jobs.test_writer import failure, generation, write


def opened(directory: Path, answered: list[int], failed: list[int], resumed: bool = False) -> Results:
    results = Results(directory, resumed=resumed)
    write(results.generations, *map(generation, answered))
    write(results.failures, *map(failure, failed))
    results.generations.flush()
    results.failures.flush()
    return results


def rows(count: int) -> list[InputRow]:
    return [InputRow(file="f", line=row + 1, row=row, id=row, prompt="x") for row in range(count)]


def test_a_resumed_run_is_given_the_rows_that_are_not_done(tmp_path: Path):
    opened(tmp_path, [5, 0, 2], [3]).__exit__(None, None, None)
    with Results(tmp_path, resumed=True) as results:
        assert [row.row for row in results.missing(rows(8))] == [1, 4, 6, 7]
        assert results.facts() == {"answered": 3, "failed": 1, "cut_bytes": 0}
        assert dict(results.failures.codes) == {"not_json": 1}


def test_rows_are_told_apart_in_any_number(tmp_path: Path):
    rng = np.random.default_rng(0)
    done = np.flatnonzero(rng.random(300) < 0.5).tolist()
    opened(tmp_path, done, []).__exit__(None, None, None)
    with Results(tmp_path, resumed=True) as results:
        assert [row.row for row in results.missing(rows(300))] == sorted(set(range(300)) - set(done))


def test_the_files_are_written_when_every_row_has_a_result(tmp_path: Path):
    with opened(tmp_path, [2, 0], [1]) as results:
        outputs = results.finish(3)
        assert [(output.path.name, output.num_rows) for output in outputs] == [
            ("generations.jsonl", 2),
            ("failures.jsonl", 1),
        ]
        results.remove_logs()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.jsonl", "generations.jsonl"]


@pytest.mark.parametrize(
    ("answered", "failed", "says"),
    [
        ([0, 2], [], r"row 1 has no result \(1 rows like it, 3 were read\)"),
        ([], [], r"row 0 has no result \(3 rows like it, 3 were read\)"),
        ([0, 1, 2], [1], "row 1 has been answered and has failed"),
        ([0, 1, 2, 3], [], "has row 3, but only 3 rows were read"),
    ],
)
def test_otherwise_there_are_no_final_files(tmp_path: Path, answered: list[int], failed: list[int], says: str):
    with opened(tmp_path, answered, failed) as results, pytest.raises(ResultsError, match=says):
        results.finish(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.partial.jsonl", "generations.partial.jsonl"]


def test_several_samples_of_a_row_are_one_row(tmp_path: Path):
    with Results(tmp_path) as results:
        write(results.generations, generation(1, 1), generation(0, 0), generation(1, 0))
        results.generations.flush()
        keys = [(r["row"], r["sample"]) for r in map(json.loads, results.finish(2)[0].path.read_text().splitlines())]
    assert keys == [(0, 0), (1, 0), (1, 1)]


def test_logs_that_contradict_each_other_are_refused(tmp_path: Path):
    opened(tmp_path, [1, 2], [2]).__exit__(None, None, None)
    with pytest.raises(RowLogError, match="row 2 was both answered and refused"):
        Results(tmp_path, resumed=True)
