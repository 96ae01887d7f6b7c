"""One module changes what must not be lost, and files appear whole."""

import ast
import os
from pathlib import Path

import pytest

from jobs import disk

JOBS = Path(disk.__file__).parent
OF_OS = {"write", "rename", "replace", "fsync", "fdatasync", "link", "unlink", "truncate", "ftruncate", "mkdir"}
OF_PATHS = {"write_bytes", "write_text", "touch", "unlink", "rename"}
ALLOWED = {
    "run_dir.py": {"write_bytes"},  # .hydra/, which a run can be without
    "run_lock.py": {"unlink"},  # of a lock without a run
}
NAMES = """
    generate_job generate_loop journal launch manifest parquet_output record_parts record_tables recorder results resume
    row_log run_dir run_lock writer
"""
"""Modules that have to do with a run's directory."""


@pytest.mark.parametrize("name", [f"{name}.py" for name in NAMES.split()])
def test_no_other_module_changes_what_must_not_be_lost(name: str):
    """So that the crash tests, which watch jobs.disk alone, see everything."""
    calls = [
        node.func
        for node in ast.walk(ast.parse((JOBS / name).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    of_os = {call.attr for call in calls if isinstance(call.value, ast.Name) and call.value.id == "os"}
    found = of_os & OF_OS | {call.attr for call in calls} & OF_PATHS
    assert found <= ALLOWED.get(name, set())


def test_a_file_is_never_seen_before_it_is_complete_and_checked(tmp_path: Path):
    path = tmp_path / "final"
    path.write_bytes(b"old")
    seen: list[bytes] = []

    def write(file: object) -> None:
        seen.append(path.read_bytes())
        file.write(b"new")  # type: ignore[attr-defined]

    def check(beside: Path) -> str:
        seen.append(path.read_bytes())
        return beside.read_text()

    assert disk.replace(path, write, check) == "new"
    assert seen == [b"old", b"old"]
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_a_file_that_fails_its_check_never_gets_its_name(tmp_path: Path):
    def refuse(path: Path) -> None:
        raise OSError("not what it should be")

    with pytest.raises(OSError, match="not what it should be"):
        disk.replace(tmp_path / "final", lambda file: file.write(b"x"), refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durable", [True, False])
def test_only_what_shall_survive_a_loss_of_power_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
):
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    disk.replace(tmp_path / "final", lambda file: file.write(b"x"), lambda path: None, durable=durable)
    assert synced == ([".final.tmp", tmp_path.name] if durable else [])


def test_the_free_space_of_a_place_that_is_gone_is_no_error(tmp_path: Path):
    assert "cannot be told" in disk.free_space(tmp_path / "gone")
    assert "bytes and" in disk.free_space(tmp_path)
