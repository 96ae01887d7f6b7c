"""Run directories are called after the model that runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from jobs.bench_workloads import COMMAND as BENCH
from jobs.command import Command
from jobs.compose import ConfigSource, compose_config
from jobs.generate_job import COMMAND
from jobs.run_dir import file_name
from jobs.text_values import as_text


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "tiny"),
        (["model.path=tiny"], "tiny"),
        (["model=qwen3"], "qwen3"),
        (["model=qwen3", "model.path=Qwen/Qwen3-0.6B"], "qwen3"),
        (["model.path=/models/my-model/"], "my-model"),
        (["model=qwen3", "model.path=Some/Other, one: 7B=x"], "Other-one-7B-x"),
        (["model.path=.."], "up"),
        (["model.path=/"], "tiny"),
        (["--config-dir", "mine", "experiment=other"], "other-model"),
        (["--config-dir", "mine", "model=own"], "own"),
        (["--config-dir", "mine", "model=own", "model.path=tiny"], "tiny"),
    ],
)
def test_a_run_is_called_after_the_model_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
):
    (tmp_path / "up/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up/here")
    for group, text in (
        ("experiment/other", "# @package _global_\nmodel:\n  path: some/other-model\n"),
        ("model/own", "path: some/thing\n"),
    ):
        (tmp_path / f"mine/{group}.yaml").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"mine/{group}.yaml").write_text(text)
    extra = tmp_path / words[1] if words[:1] == ["--config-dir"] else None
    assert called(COMMAND, words if extra is None else words[2:], extra) == name


def test_a_benchmark_is_too():
    assert called(BENCH, ["model=tiny"]) == "tiny"
    assert called(BENCH, ["model=tiny", "model.path=/models/my-model"]) == "my-model"


def called(command: Command[Any], words: list[str], extra_dir: Path | None = None) -> str:
    """What follows the time in the name of the run's directory."""
    source = ConfigSource(
        schema=command.schema, config_dir=command.config_dir, config_name=command.config_name, extra_dir=extra_dir
    )
    wanted = compose_config(source, list(map(as_text, words))).run_dir
    return re.sub(r"^\d\d-\d\d-\d\d-\d{6}_", "", file_name(wanted.name))
