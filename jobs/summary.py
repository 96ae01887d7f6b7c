"""What a run says of itself on the terminal when it is done."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.figures import Figures
from jobs.scoring import score


def show(text: str) -> None:
    """Prints to standard output; a reader of it that has gone away takes nothing from a run that is complete."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it exits


def summary(
    directory: Path,
    counts: Mapping[str, Any],
    figures: Figures,
    generations: Path,
    answers: Path | None,
    *,
    attempt: int = 0,
) -> str:
    """A few aligned lines from GenerateLoop's counts; `answers` is the input file when its rows carry the answers.

    Counts and score are the run's, `figures` those of its last attempt, the number of which is `attempt`.
    """
    lines = [
        ("run directory", os.path.relpath(directory)),
        ("rows", f"{counts['answered']:,} answered, {counts['failed']:,} failed"),
    ]
    if counts["failed"]:
        by_code = ", ".join(f"{code} {number:,}" for code, number in counts["failed_by_code"].items())
        lines.append(("failures", f"{by_code}; the rows and reasons are in failures.jsonl"))
    if attempt:
        lines.append((f"attempt {attempt}", "alone has the tokens, speed, prefix cache and preemptions that follow"))
    lines += figures.lines()
    if answers is not None:
        lines.append(("score", _score_line(answers, generations, counts["rows"])))
    return "\n".join(f"{name:14s} {value}" for name, value in lines)


def _score_line(answers: Path, generations: Path, num_rows: int) -> str:
    prompts = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()][:num_rows]
    result = score(prompts, _records(generations))
    return f"answered {result.num_correct} of {result.num_total} correctly"


def _records(generations: Path) -> Iterator[Mapping[str, Any]]:
    if generations.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(generations, columns=["row", "sample", "text"]).to_pylist()
        return
    with open(generations, encoding="utf-8") as file:
        yield from map(json.loads, file)
