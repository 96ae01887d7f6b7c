"""Prompts that are made up share exactly what the recorded ones shared."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from jobs.shared_prefix import SharedPrefixIndex
from jobs.simulation import reading_rows
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_rows import RecordedRows
from jobs.simulation.recorded_run import RecordedRun
from tests.jobs.synthetic_run import Row, law, write_run


def common(first: np.ndarray, second: np.ndarray) -> int:
    both = min(len(first), len(second))
    return next((place for place in range(both) if first[place] != second[place]), both)


@pytest.mark.parametrize("most_kept", [reading_rows.KEPT_TOKENS, 0], ids=["kept", "made up each time"])
@pytest.mark.parametrize("seed", range(4))
def test_every_two_prompts_have_as_many_leading_tokens_in_common_as_before(
    seed: int, most_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading_rows, "KEPT_TOKENS", most_kept)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 2, rng.integers(1, 9)).astype(np.int32) for _ in range(80)]
    index = SharedPrefixIndex()
    shared = [index.add(row, prompt) for row, prompt in enumerate(prompts)]
    rows = [
        Row(num_prompt_tokens=len(p), num_output_tokens=2, shared_prefix_row=s.row, shared_prefix_tokens=s.num_tokens)
        for p, s in zip(prompts, shared, strict=True)
    ]
    write_run(tmp_path / "run", rows, law(forward={"step": 1.0}))
    made_up = read_rows(RecordedRun("run", tmp_path / "run")).rows
    again = [made_up.prompt(index) for index in range(len(rows))]
    lengths = {
        (i, j): (common(prompts[i], prompts[j]), common(again[i], again[j])) for i in range(80) for j in range(i)
    }
    assert {pair: both for pair, both in lengths.items() if both[0] != both[1]} == {}
    assert max(before for before, _ in lengths.values()) > 4
    assert [len(prompt) for prompt in again] == [len(prompt) for prompt in prompts]


def test_outputs_are_unlike_each_other_where_the_generations_are_gone(tmp_path: Path):
    rows = [Row(num_prompt_tokens=5, num_output_tokens=3), Row(num_prompt_tokens=4, num_output_tokens=2)]
    write_run(tmp_path / "run", rows, law(forward={"step": 1.0}))
    read = read_rows(RecordedRun("run", tmp_path / "run"))
    made_up = read.rows
    assert read.num_known_outputs == 0
    first, second = (made_up.output_tokens[start] for start in made_up.output_starts)
    assert first != second


def test_what_is_saved_is_loaded(tmp_path: Path):
    rows = [
        Row(num_prompt_tokens=9, num_output_tokens=3),
        Row(num_prompt_tokens=7, num_output_tokens=2, shared_prefix_row=0, shared_prefix_tokens=5),
    ]
    write_run(tmp_path / "run", rows, law(forward={"step": 1.0}))
    saved = read_rows(RecordedRun("run", tmp_path / "run")).rows
    saved.save(tmp_path)
    loaded = RecordedRows.load(tmp_path)
    for field in fields(RecordedRows):
        before, after = getattr(saved, field.name), getattr(loaded, field.name)
        assert before.dtype == after.dtype
        assert before.tolist() == after.tolist(), field.name
    assert [loaded.prompt(index).tolist() for index in range(2)] == [saved.prompt(index).tolist() for index in range(2)]
