"""Names and exclusive claims of run directories."""

import os
from pathlib import Path

import pytest

from jobs.launch import launch
from jobs.run_dir import ALLOWED_NAME, MAX_NAME, claim, file_name, make_free
from jobs.usage import UsageError
from tests.jobs.standin import COMMAND
from tests.jobs.standin_process import finish, manifests, start

PROCESSES = 8


def exclusive(path: Path) -> None:
    os.close(os.open(path / "manifest.json", os.O_CREAT | os.O_EXCL))


@pytest.mark.parametrize(
    "text",
    [
        "tiny",
        "a=b,c",
        "a/b",
        "../x",
        "/etc/passwd",
        "",
        "...",
        "é日本",
        "a b",
        "x" * 300,
        "%2e%2e",
        "a\0b",
        "-m",
        ".hidden",
    ],
)
@pytest.mark.parametrize("suffix", ["", "-2", "_0123abcd"])
def test_every_text_becomes_an_allowed_name(text: str, suffix: str):
    name = file_name(text, suffix)
    assert ALLOWED_NAME.fullmatch(name)
    assert len(name) <= MAX_NAME
    assert name.endswith(suffix)


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path):
    paths = [claim(tmp_path / "run", False, exclusive).path.name for _ in range(3)]
    assert paths == ["run", "run-2", "run-3"]


def test_a_claim_knows_what_it_created_and_takes_it_back(tmp_path: Path):
    directory = claim(tmp_path / "a/b/run", False, exclusive)
    assert directory.created == (tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/run")
    assert directory.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_a_result_is_never_discarded(tmp_path: Path):
    directory = claim(tmp_path / "run", False, exclusive)
    (directory.path / "generations.jsonl").write_text("{}\n")
    assert not directory.discard()
    assert directory.path.exists()


def test_files_that_are_still_empty_are_no_result(tmp_path: Path):
    directory = claim(tmp_path / "run", False, exclusive)
    (directory.path / "records/steps").mkdir(parents=True)
    (directory.path / "generations.jsonl").touch()
    assert directory.discard()


def test_a_parent_that_another_run_uses_stays(tmp_path: Path):
    first = claim(tmp_path / "day/first", False, exclusive)
    claim(tmp_path / "day/second", False, exclusive)
    assert first.discard()
    assert [path.name for path in (tmp_path / "day").iterdir()] == ["second"]


def test_a_chosen_directory_that_was_there_is_not_discarded(tmp_path: Path):
    directory = claim(tmp_path, True, exclusive)
    assert not directory.discard()
    assert tmp_path.exists()


@pytest.mark.parametrize("left", ["manifest.json", "generations.jsonl", "failures.jsonl", "records"])
def test_a_chosen_directory_with_a_run_is_refused(tmp_path: Path, left: str):
    (tmp_path / left).touch()
    with pytest.raises(UsageError, match=f"hydra.run.dir={tmp_path}: already holds a run \\({left}\\)"):
        claim(tmp_path, True, exclusive)


@pytest.mark.parametrize("name", ["a=b", "a,b", "a b", ".hidden", "é", "x" * 81])
def test_a_chosen_name_that_is_not_allowed_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="is not allowed"):
        claim(tmp_path / name, True, exclusive)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chosen", [True, False])
def test_a_file_in_the_way_is_a_message(tmp_path: Path, chosen: bool):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used for a run"):
        claim(tmp_path / "file" / "run", chosen, exclusive)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_claim_that_fails_half_way_leaves_nothing(tmp_path: Path, chosen: bool):
    def disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left"):
        claim(tmp_path / "a/run", chosen, disk_full)
    assert list(tmp_path.iterdir()) == []


def test_two_directories_of_one_name_are_two(tmp_path: Path):
    first, second = make_free(tmp_path / "sweep"), make_free(tmp_path / "sweep")
    assert (first[-1].name, second[-1].name) == ("sweep", "sweep-2")


def test_a_second_run_into_a_chosen_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert launch(COMMAND, ["hydra.run.dir=mine"]) == 0
    before = (tmp_path / "mine/manifest.json").read_bytes()
    assert launch(COMMAND, ["hydra.run.dir=mine"]) == 2
    assert f"hydra.run.dir={tmp_path}/mine: already holds a run" in capfd.readouterr().err
    assert (tmp_path / "mine/manifest.json").read_bytes() == before


def test_processes_that_start_at_once_get_a_directory_each(tmp_path: Path):
    """The pattern gives all of them the same name, so that they collide whatever the clock says."""
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/same.yaml").write_text("# @package _global_\nhydra:\n  run:\n    dir: outputs/same\n")
    words = ("--config-dir", "mine", "experiment=same")
    ended = [finish(process) for process in [start(tmp_path, *words) for _ in range(PROCESSES)]]
    assert [code for code, _, _ in ended] == [0] * PROCESSES
    runs = manifests(tmp_path / "outputs")
    assert len(runs) == PROCESSES
    assert all(content["status"] == "complete" for content in runs.values())


def test_of_processes_that_choose_one_directory_one_runs(tmp_path: Path):
    ended = [finish(process) for process in [start(tmp_path, "hydra.run.dir=mine") for _ in range(4)]]
    assert sorted(code for code, _, _ in ended) == [0, 2, 2, 2]
    assert all("already holds a run" in err for code, _, err in ended if code == 2)
    assert len(manifests(tmp_path)) == 1
