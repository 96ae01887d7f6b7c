"""python -m jobs.bench rows: a workload as the input of a generate job."""

import json
import shlex
from pathlib import Path

import pytest

from jobs.bench import main
from jobs.workloads import WORKLOADS, Sizes
from tests.jobs.generate_process import generate

SMALL = ("scale=0.02", "vocab_size=1600")


def test_the_rows_are_the_workload_and_the_job_that_is_shown_answers_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "nano rows.jsonl"
    assert main(["rows", "workload=nano", f"out={file}", "seed=3", *SMALL]) == 0
    load = WORKLOADS["nano"].build(3, Sizes(scale=0.02, vocab_size=1600))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt_token_ids"] for row in rows] == load.prompts
    assert [row["sampling"]["max_tokens"] for row in rows] == load.output_lens
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "jobs.generate"]
    run = generate(tmp_path / "run", *command[4:], "model=tiny")
    assert run.code == 0
    assert [row["num_output_tokens"] for row in run.generations] == load.output_lens
    assert run.manifest["config"]["model"]["load_format"] == "dummy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["workload=nano"], "out=FILE is missing"),
        (["out=FILE"], "workload=: must be one or more of nano"),
        (["workload=huge", "out=FILE"], "workload=huge: must be one or more of nano"),
        (["workload=nano", "out=FILE", "seed=x"], "seed=x: must be an integer of at least 1"),
        (["workload=nano", "out=FILE", "scale=2"], "scale=2: must be above 0 and at most 1"),
        (["workload=nano", "out=FILE", "size=2"], "size=2: jobs.bench rows takes workload=..., "),
        (["workload=nano", "out=TAKEN"], "File exists"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "TAKEN").write_text("mine")
    words = [word.replace("out=", f"out={tmp_path}/") for word in words]
    assert main(["rows", *words]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "TAKEN").read_text() == "mine"
    assert not (tmp_path / "FILE").exists()
