"""resume=DIR: what goes on, what is refused and why, and what the manifest says of it. The runner is scripted."""

import errno
import fcntl
import json
import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from jobs import journal
from jobs.analysis.audit import audit
from jobs.launch import launch
from jobs.record_parts import PartWriter
from jobs.writer import GenerationWriter
from tests.jobs.crash_check import check_complete, read_table
from tests.jobs.scripted_job import SCRIPTED, without_attempt, words, write_input

NUM_ROWS = 18
COMPLETE = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("reference")
    write_input(directory / "rows.jsonl", NUM_ROWS)
    with chdir(directory):
        assert launch(SCRIPTED, [*words(Path("rows.jsonl")), "hydra.run.dir=run"]) == COMPLETE
    names = ("generations.jsonl", "failures.jsonl")
    return {name: without_attempt((directory / "run" / name).read_bytes()) for name in names}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pattern")
    write_input(directory / "rows.jsonl", NUM_ROWS)
    with chdir(directory):
        code = launch(SCRIPTED, [*words(Path("rows.jsonl")), "reader.max_failures=1", "hydra.run.dir=run"])
    assert code == 1
    assert 0 < len((directory / "run/generations.partial.jsonl").read_bytes().splitlines()) < NUM_ROWS - 3
    return directory


@pytest.fixture
def broken_off(pattern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended early, with answered and failed rows, of the input rows.jsonl beside it."""
    shutil.copytree(pattern, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def resume(*more: str, directory: str = "run") -> int:
    return launch(SCRIPTED, [f"resume={directory}", *more])


def go_on(*more: str) -> int:
    return resume("reader.max_failures=null", *more)


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("version", "says"), [(2, "schema_version=2 is newer than 1"), (None, "no run's manifest")])
def test_a_run_of_a_newer_version_is_refused_and_left_alone(
    version: int | None, says: str, broken_off: Path, capfd: pytest.CaptureFixture[str]
):
    (broken_off / "manifest.json").write_text(json.dumps(manifest(broken_off) | {"schema_version": version}))
    (broken_off / ".manifest.json.1.tmp").write_text("of the newer version")
    before = contents(broken_off)
    assert go_on() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line
    assert contents(broken_off) == before


def test_a_run_goes_on_where_it_ended_and_comes_to_the_same(broken_off: Path, reference: dict[str, bytes]):
    answered = json_lines(broken_off / "generations.partial.jsonl")
    before = {path.name for path in broken_off.parent.iterdir()}
    assert go_on() == COMPLETE
    check_complete(broken_off, {}, reference)
    assert {path.name for path in broken_off.parent.iterdir()} == before, "no new directory"
    texts = {row["row"]: row["text"] for row in json_lines(broken_off / "generations.jsonl")}
    assert {row["row"] for row in answered} == {row for row, text in texts.items() if text == "attempt 0"}
    assert set(texts.values()) == {"attempt 0", "attempt 1"}, "done rows are not computed again"


def test_a_resumed_run_takes_nothing_in_again_that_is_done(broken_off: Path):
    done = {row["row"] for row in json_lines(broken_off / "generations.partial.jsonl")}
    assert go_on() == COMPLETE
    again = {r["row"] for r in read_table(broken_off, "requests") if r["attempt"] == 1}
    assert again.isdisjoint(done)
    assert again


def test_the_manifest_lists_the_attempts(broken_off: Path):
    assert go_on("kv.num_blocks=32") == COMPLETE
    content = manifest(broken_off)
    first, second = content["attempts"]
    assert (first["status"], first["exit_code"]) == ("failed", 1)
    assert "max_failures=1" in first["error"]
    assert (second["status"], second["exit_code"], second["error"]) == ("complete", COMPLETE, None)
    assert first["started"] < first["ended"] <= second["started"] < second["ended"]
    assert second["command"][3:] == ["resume=run", "reader.max_failures=null", "kv.num_blocks=32"]
    assert second["overrides"] == second["command"][3:]
    assert content["command"] == first["command"], "the command that made the directory"
    assert (first["config"]["kv"]["num_blocks"], content["config"]["kv"]["num_blocks"]) == (None, 32)
    assert second["began_with"]["answered"] > 0
    assert [phase["name"] for phase in second["phases"]] == ["generate", "write", "finish"]
    assert second["phases"][0]["start_ns"] > first["phases"][-1]["end_ns"]
    assert content["counts"]["rows"] == NUM_ROWS


def test_overrides_stay_with_the_run(broken_off: Path):
    assert resume("kv.num_blocks=32") == 1, "reader.max_failures=1 is the run's own"
    assert go_on() == COMPLETE
    assert manifest(broken_off)["config"]["kv"]["num_blocks"] == 32
    assert len(manifest(broken_off)["attempts"]) == 3


def test_a_killed_attempt_is_called_so(broken_off: Path):
    content = manifest(broken_off)
    content["attempts"][0].update(ended=None, status="running")
    content["status"] = "running"
    (broken_off / "manifest.json").write_text(json.dumps(content))
    assert go_on() == COMPLETE
    assert [attempt["status"] for attempt in manifest(broken_off)["attempts"]] == ["killed", "complete"]


def test_without_records_numbers_go_on_by_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "rows.jsonl", NUM_ROWS)
    given = [*words(Path("rows.jsonl")), "reader.max_failures=1", "hydra.run.dir=run", "recorder=off"]
    assert launch(SCRIPTED, given) == 1
    first = manifest(tmp_path / "run")["attempts"][0]
    assert first["last_step"] > 0
    assert go_on("recorder=on") == COMPLETE
    steps = read_table(tmp_path / "run", "steps")
    assert steps[0]["step"] == first["last_step"] + 1
    assert min(seq_id for step in steps for seq_id in step["seq_ids"]) > first["last_seq_id"]


FULL = {"the answers": (GenerationWriter, "flush", 2), "the records": (PartWriter, "write", 8)}
"""Where a disk is full, and from which call on."""


@pytest.mark.parametrize("what", FULL)
def test_an_attempt_whose_disk_is_full_is_gone_on_with_without_a_gap(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
):
    """Only these files fail: the manifest can still be written, which is what a small file often can."""
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "rows.jsonl", NUM_ROWS)
    monkeypatch.setattr(journal, "MAX_UNWRITTEN_BYTES", 1500)
    monkeypatch.setattr(journal, "WAKE_AT", 1)
    writer, method, call = FULL[what]
    write, calls = getattr(writer, method), []

    def full(self: object, *arguments: object) -> None:
        calls.append(method)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, method, full)
        assert launch(SCRIPTED, [*words(Path("rows.jsonl")), "hydra.run.dir=run"]) == 1
    run = tmp_path / "run"
    first = manifest(run)["attempts"][0]
    assert (first["status"], first["recorder"], first["sealed"]) == ("failed", True, False)
    assert "last_step" not in first, "the records alone say which steps there were"
    steps = read_table(run, "steps")
    assert steps, "some were written before"
    assert audit(run).first is None, str(audit(run))
    content = manifest(run)
    content["attempts"][0]["last_step"] = len(steps) + 3  # as earlier versions wrote it
    (run / "manifest.json").write_text(json.dumps(content))

    assert resume() == COMPLETE

    check_complete(run, {}, reference)
    assert manifest(run)["attempts"][1]["sealed"] is True
    assert audit(run).first is None, str(audit(run))


def test_attempts_with_and_without_records_make_one_sound_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "rows.jsonl", 60)
    run = tmp_path / "run"
    assert launch(SCRIPTED, [*words(Path("rows.jsonl")), "reader.max_failures=1", "hydra.run.dir=run"]) == 1
    assert resume("recorder=off", "reader.max_failures=4") == 1
    assert go_on("recorder=on") == COMPLETE
    attempts = manifest(run)["attempts"]
    assert [(a["recorder"], a["sealed"], "last_step" in a) for a in attempts] == [
        (True, True, False),
        (False, True, True),
        (True, True, False),
    ]
    steps = read_table(run, "steps")
    assert {step["attempt"] for step in steps} == {0, 2}
    assert next(s["step"] for s in steps if s["attempt"] == 2) == attempts[1]["last_step"] + 1
    rows = {row["row"] for row in json_lines(run / "generations.jsonl")}
    assert rows - {request["row"] for request in read_table(run, "requests")}, "the middle attempt answered some"
    found = audit(run)
    assert found.first is None, str(found)
    assert "attempt 1 ran with recorder=off" in str(found)
    assert "\nattempt 2      alone has the tokens" in capfd.readouterr().out
    content = manifest(run)
    content["attempts"][1]["recorder"] = True
    (run / "manifest.json").write_text(json.dumps(content))
    assert {"step numbers have a gap", "a row has no request"} <= {v.law for v in audit(run).violations}


# Refusals


CHANGES = [
    ("sampling.temperature=0.5", "sampling.temperature is 0.5, the run has null"),
    ("seed=1", "seed is 1, the run has 0"),
    ("model.dtype=bfloat16", "model.dtype is bfloat16, the run has auto"),
    ("model.revision=main", "model.revision is main, the run has null"),
    ("model=qwen3", "model.path is Qwen/Qwen3-0.6B, the run has tiny"),
    ("engine.max_model_len=60", "engine.max_model_len is 60, the run has null"),
    ("input=other.jsonl", "input is other.jsonl, the run has rows.jsonl"),
    ("reader.limit=3", "reader.limit is 3, the run has null"),
    ("reader.prompt=id", "reader.prompt is id, the run has null"),
    ("reader.system=x", "reader.system is x, the run has null"),
    ("writer.format=parquet", "writer.format is parquet, the run has jsonl"),
    ("writer.keep=[a]", "writer.keep is ['a'], the run has []"),
]


@pytest.mark.parametrize(("override", "says"), CHANGES, ids=[override for override, _ in CHANGES])
def test_what_changes_answers_is_refused_by_name_and_nothing_is_touched(
    override: str, says: str, broken_off: Path, capfd: pytest.CaptureFixture[str]
):
    before = contents(broken_off)
    capfd.readouterr()
    assert go_on(override) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: resume=run: other answers would come: ")
    assert says in err
    assert err.count("\n") == 1
    assert contents(broken_off) == before


@pytest.mark.parametrize(
    "override",
    ["kv.num_blocks=20", "engine.max_num_seqs=2", "recorder.flush_s=1", "log_level=INFO", "writer.durability=process"],
)
def test_what_changes_no_answers_is_taken(override: str, broken_off: Path, reference: dict[str, bytes]):
    assert go_on(override) == COMPLETE
    assert without_attempt((broken_off / "generations.jsonl").read_bytes()) == reference["generations.jsonl"]


def edited(data: bytes) -> bytes:
    return data.replace(b"[0]", b"[1]", 1)


def reordered(data: bytes) -> bytes:
    first, second, *rest = data.splitlines(keepends=True)
    return b"".join([second, first, *rest])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited, "has the sha256"),
        (reordered, "has the sha256"),
        (lambda data: data + b'{"prompt_token_ids": [1]}\n', "bytes; in the run it had"),
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "bytes; in the run it had"),
    ],
    ids=["edited", "reordered", "appended to", "shortened"],
)
def test_an_input_that_has_changed_is_refused(
    change: Any, says: str, broken_off: Path, capfd: pytest.CaptureFixture[str]
):
    rows = broken_off.parent / "rows.jsonl"
    data = rows.read_bytes()
    rows.write_bytes(change(data))
    assert rows.read_bytes() != data
    before = contents(broken_off)
    assert go_on() == 2
    err = capfd.readouterr().err
    assert "other answers would come: input rows.jsonl: " in err
    assert says in err
    assert contents(broken_off) == before
    rows.write_bytes(data)
    assert go_on() == COMPLETE, "with the input as it was, it goes on"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"])
def test_a_model_file_that_has_changed_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from nanovllm.models.source import resolve_model

    monkeypatch.chdir(tmp_path)
    directory = resolve_model("tiny").directory
    assert directory is not None
    shutil.copytree(directory, tmp_path / "model")
    write_input(tmp_path / "rows.jsonl", NUM_ROWS)
    given = [*words(Path("rows.jsonl")), "model.path=model", "reader.max_failures=1", "hydra.run.dir=run"]
    assert launch(SCRIPTED, given) == 1
    with open(tmp_path / "model" / name, "ab") as file:
        file.write(b"\n" if name != "model.safetensors" else b"")
    if name == "model.safetensors":
        with open(tmp_path / "model" / name, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    assert go_on() == 2
    assert f"model {name}: has" in capfd.readouterr().err


def test_from_another_directory_the_message_says_where_the_run_was_started(
    broken_off: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], pattern: Path
):
    (broken_off.parent / "elsewhere").mkdir()
    monkeypatch.chdir(broken_off.parent / "elsewhere")
    assert resume(directory="../run") == 2
    err = capfd.readouterr().err
    assert "error: resume=../run: input=rows.jsonl: no such file" in err
    assert f"(the run was started in {pattern})" in err


def test_a_file_more_or_less_of_a_glob_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_input(tmp_path / f"{name}.jsonl", 9)
    given = [*words(Path("x")), "input='*.jsonl'", "reader.max_failures=1", "hydra.run.dir=run"]
    assert launch(SCRIPTED, given) == 1
    write_input(tmp_path / "c.jsonl", 2)
    assert go_on() == 2
    assert "input c.jsonl: is not among the files of the run" in capfd.readouterr().err
    (tmp_path / "c.jsonl").unlink()
    (tmp_path / "a.jsonl").unlink()
    assert go_on() == 2
    assert "input a.jsonl: is gone" in capfd.readouterr().err


def test_a_pipe_cannot_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "rows.jsonl", NUM_ROWS)
    with open(tmp_path / "rows.jsonl") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        given = [*words(Path("x")), "input=-", "reader.max_failures=1", "hydra.run.dir=run"]
        assert launch(SCRIPTED, given) == 1
    assert "resume=" not in capfd.readouterr().err
    assert go_on() == 2
    assert "its input is standard input, which can be read only once" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["resume=nowhere"], "resume=nowhere: no such run directory"),
        (["resume=."], "resume=.: holds no run (manifest.json is not there)"),
        (["resume=run", "hydra.run.dir=x"], "hydra.run.dir: has no effect with resume=run"),
        (["-m", "resume=run", "seed=0,1"], "resume=run: a sweep cannot be resumed"),
        (["resume=run", "modle=x"], "modle=x: no such key"),
        (["resume=run", "kv.block_size=0"], "kv.block_size=0: must be an integer from 1 to 4096"),
        (["resume=run,other"], "several values"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message(given: list[str], says: str, broken_off: Path, capfd: pytest.CaptureFixture[str]):
    before = contents(broken_off.parent)
    capfd.readouterr()
    assert launch(SCRIPTED, given) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert contents(broken_off.parent) == before


def test_a_run_that_another_process_writes_is_refused_at_once(broken_off: Path, capfd: pytest.CaptureFixture[str]):
    with open(broken_off / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before = contents(broken_off)
        assert go_on() == 2
        assert "resume=run: another process is writing this run" in capfd.readouterr().err
        assert contents(broken_off) == before
    assert go_on() == COMPLETE


def test_a_locked_directory_is_not_claimed_for_a_new_run_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "rows.jsonl", NUM_ROWS)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert launch(SCRIPTED, [*words(Path("rows.jsonl")), "hydra.run.dir=run"]) == 2
    assert "hydra.run.dir=" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_secret_must_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHERE", "rows.jsonl")
    write_input(tmp_path / "rows.jsonl", NUM_ROWS)
    given = [*words(Path("x")), "input=${oc.env:WHERE}", "reader.max_failures=1", "hydra.run.dir=run"]
    assert launch(SCRIPTED, given) == 1
    assert go_on() == 2
    assert "resume=run: input was a secret and is not written down; give it again" in capfd.readouterr().err
    assert go_on("input=${oc.env:WHERE}") == COMPLETE


# Results that are not what they were


def test_a_complete_run_is_verified_and_ends_with_its_code(broken_off: Path, capfd: pytest.CaptureFixture[str]):
    assert go_on() == COMPLETE
    before = contents(broken_off)
    capfd.readouterr()
    (broken_off.parent / "rows.jsonl").unlink()
    assert resume() == COMPLETE, "the input is not needed any more"
    assert "complete, 15 answered, 3 failed; files verified" in capfd.readouterr().out
    assert contents(broken_off) == before


@pytest.mark.parametrize("name", ["generations.jsonl", "failures.jsonl"])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_complete_run_whose_files_have_changed_says_so(
    name: str, how: str, broken_off: Path, capfd: pytest.CaptureFixture[str]
):
    assert go_on() == COMPLETE
    path = broken_off / name
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"row":3', b'"row":4').replace(b'"row":0', b'"row":9'))
    before = contents(broken_off)
    assert resume() == 1
    assert str(path) in capfd.readouterr().err
    assert contents(broken_off) == before


def test_acknowledged_rows_that_are_gone_end_the_attempt(broken_off: Path, capfd: pytest.CaptureFixture[str]):
    (broken_off / "generations.partial.jsonl").write_bytes(b"")
    assert go_on() == 1
    err = capfd.readouterr().err
    assert "generations.partial.jsonl: has 0 rows, but the manifest says that" in err
    assert not (broken_off / "generations.jsonl").exists()


def test_a_row_in_both_logs_ends_the_attempt(broken_off: Path, capfd: pytest.CaptureFixture[str]):
    line = (broken_off / "failures.partial.jsonl").read_bytes().splitlines(keepends=True)[0]
    row = json.loads(line)["row"]
    from jobs.row_log import sealed_line

    with open(broken_off / "generations.partial.jsonl", "ab") as log:
        log.write(sealed_line(b'{"row":%d,"sample":0,"id":"x"}' % row))
    assert go_on() == 1
    assert f"row {row} was both answered and refused" in capfd.readouterr().err
