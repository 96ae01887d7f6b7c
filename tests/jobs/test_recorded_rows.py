"""Prompts that are made up share exactly what the recorded ones shared."""

from pathlib import Path

import numpy as np
import pytest

from jobs.shared_prefix import SharedPrefixIndex
from jobs.simulation.recorded_rows import RecordedRows
from jobs.simulation.recorded_run import RecordedRun
from tests.jobs.synthetic_run import Row, law, write_run


def common(first: np.ndarray, second: np.ndarray) -> int:
    both = min(len(first), len(second))
    return next((place for place in range(both) if first[place] != second[place]), both)


@pytest.mark.parametrize("seed", range(4))
def test_every_two_prompts_have_as_many_leading_tokens_in_common_as_before(seed: int, tmp_path: Path):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 2, rng.integers(1, 9)).astype(np.int32) for _ in range(80)]
    index = SharedPrefixIndex()
    shared = [index.add(row, prompt) for row, prompt in enumerate(prompts)]
    rows = [
        Row(num_prompt_tokens=len(p), num_output_tokens=2, shared_prefix_row=s.row, shared_prefix_tokens=s.num_tokens)
        for p, s in zip(prompts, shared, strict=True)
    ]
    write_run(tmp_path / "run", rows, law(forward={"step": 1.0}))
    made_up = RecordedRows(RecordedRun("run", tmp_path / "run"))
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
    made_up = RecordedRows(RecordedRun("run", tmp_path / "run"))
    assert made_up.num_known_outputs == 0
    first, second = (made_up.output_tokens[start] for start in made_up.output_starts)
    assert first != second
