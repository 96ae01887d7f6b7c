"""The lines that a run ends with, from its counts and figures."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.figures import Figures
from jobs.summary import summary

FIGURES = Figures(
    num_steps=9,
    num_prompt_tokens=12_000,
    num_cached_prompt_tokens=3_000,
    num_output_tokens=2_500,
    num_preemptions=4,
    first_step_start_ns=1_000_000_000,
    last_step_end_ns=3_000_000_000,
)
COUNTS = {"rows": 4, "answered": 3, "failed": 1, "failed_by_code": {"not_json": 1}}
TEXTS = {0: "3", 1: "b, a", 3: "wrong"}


def lines(
    directory: Path,
    answers: Path | None = None,
    format: str = "jsonl",
    counts: dict[str, Any] = COUNTS,
    figures: Figures = FIGURES,
) -> dict[str, str]:
    text = summary(directory, counts, figures, directory / f"generations.{format}", answers)
    return {line[:14].strip(): line[15:] for line in text.splitlines()}


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Prompts with their answers; the third is the one that failed."""
    rows = [{"task": "count", "answer": answer} for answer in ("3", "b, a", "x", "right", "beyond reader.limit")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_generations(directory: Path, format: str) -> None:
    rows = [{"row": row, "sample": 0, "text": text} for row, text in TEXTS.items()]
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), directory / "generations.parquet")
    else:
        (directory / "generations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_summary_names_rows_tokens_speed_prefix_cache_and_preemptions(tmp_path: Path):
    assert lines(tmp_path) == {
        "run directory": os.path.relpath(tmp_path),
        "rows": "3 answered, 1 failed",
        "failures": "not_json 1; the rows and reasons are in failures.jsonl",
        "tokens": "12,000 in, 2,500 out",
        "speed": "1,250 output tok/s over 2.00 s",
        "prefix cache": "25.0% of the prompt tokens were cached",
        "preemptions": "4",
    }


def test_the_summary_of_a_resumed_run_says_which_figures_are_its_last_attempts(tmp_path: Path):
    text = summary(tmp_path, COUNTS, FIGURES, tmp_path / "generations.jsonl", None, attempt=2)
    names = [line[:14].strip() for line in text.splitlines()]
    before, after = names[: names.index("attempt 2")], names[names.index("attempt 2") + 1 :]
    assert before == ["run directory", "rows", "failures"], "the run's"
    assert after == ["tokens", "speed", "prefix cache", "preemptions"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_score_counts_a_failed_row_as_wrong_and_no_row_beyond_the_limit(tmp_path: Path, answers: Path, format: str):
    write_generations(tmp_path, format)
    assert lines(tmp_path, answers, format)["score"] == "answered 2 of 4 correctly"


def test_a_run_without_rows_has_a_summary_too(tmp_path: Path, answers: Path):
    (tmp_path / "generations.jsonl").touch()
    shown = lines(tmp_path, answers, counts={"rows": 0, "answered": 0, "failed": 0}, figures=Figures())
    assert shown["speed"] == "0.0 output tok/s over 0.00 s"
    assert shown["prefix cache"] == "0.0% of the prompt tokens were cached"
    assert shown["score"] == "answered 0 of 0 correctly"
