"""The small example as a user starts it."""

import re
from pathlib import Path

import pytest

from tests.jobs.generate_process import start


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """stdout and stderr of `python -m jobs.example`, which leaves no file behind."""
    cwd: Path = tmp_path_factory.mktemp("example")
    process = start(cwd, module="jobs.example")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert list(cwd.iterdir()) == []
    return out, err


def test_the_example_prints_both_questions_and_their_right_answers(example: tuple[str, str]):
    first, first_answer, second, second_answer = example[0].splitlines()
    assert answer_of(first_answer) == str(sum(map(int, re.findall(r"\d+", first))))
    assert second.startswith("Sort these words from A to Z: ")
    assert answer_of(second_answer) == ", ".join(sorted(second.partition(": ")[2].split(", ")))


def answer_of(line: str) -> str:
    found = re.fullmatch(r" {4}(.+?) {4}\(stop, \d+ tokens\)", line)
    assert found is not None, line
    return found[1]


def test_the_example_shows_the_engines_log(example: tuple[str, str]):
    log = example[1]
    for line in (
        "Initializing LLMEngine",
        "Model: tiny",
        "Starting generation for 2 prompts",
        "Total prompt tokens: ",
        "Scheduled PREFILL batch: size=2, ",
        "Scheduled DECODE batch (step 1): size=2, preempted=0, ",
        "Generation complete: ",
    ):
        assert log.count(f"] {line}") == 1, line
