"""What run= names, which versions are read, and how each complaint reads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.analysis.answers import read_answers
from jobs.analysis.audit import audit
from jobs.analysis.program import main
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_paths import find_runs
from jobs.analysis.segments import segments
from jobs.record_schemas import STEPS
from tests.analysis.editing import copied, edit_manifest, rows_of, write_table
from tests.jobs.generate_process import ROOT

COMMANDS = ("analyze", "audit", "explain", "diff", "trace")


def complaint(capsys: pytest.CaptureFixture[str], module: str, *words: str) -> str:
    """The one line that a command ends with when it cannot run."""
    code = main(module, words)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    return err


def test_a_run_a_sweep_and_a_glob_are_found(run: Path, plain_run: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name, source in (("job-2", run), ("job-1", plain_run)):
        copied(source, sweep / name)
    edit_manifest(sweep / "job-1", lambda manifest: manifest.update(clock_zero="2026-11-24T09:00:00+00:00"))
    (sweep / "notes").mkdir()

    assert find_runs("run", str(run)) == [run]
    assert find_runs("run", str(sweep)) == [sweep / "job-2", sweep / "job-1"], "the oldest first"
    assert find_runs("run", f"{sweep}/job-?") == [sweep / "job-2", sweep / "job-1"]
    assert find_runs("run", f"{tmp_path}/s*") == [sweep / "job-2", sweep / "job-1"], "a glob may find a sweep"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "run= is missing"),
        (["run=nowhere"], "run=nowhere: does not exist; it must be a run directory"),
        (["run="], "run=: is empty"),
        (["run=a", "run=b"], "run= stands there twice"),
        (["run=a", "rows=3"], "rows=3: must be one of run=..."),
        (["nothing"], "nothing: must be one of run=..."),
    ],
)
def test_what_is_no_run_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in complaint(capsys, "audit", *words)


def test_a_directory_without_a_run_and_one_without_records_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no run" in complaint(capsys, "audit", f"run={tmp_path}")
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    assert "recorder=off" in complaint(capsys, "audit", f"run={tmp_path / 'off'}")
    (tmp_path / "off" / "manifest.json").write_text("{}")
    assert "is not a run's manifest" in complaint(capsys, "audit", f"run={tmp_path / 'off'}")


def test_a_job_of_a_sweep_without_records_is_left_out_and_named(
    run: Path, plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one whose configuration was refused."""
    for name, source in (("a", run), ("b", plain_run), ("c", run)):
        copied(source, tmp_path / "sweep" / name)
    shutil.rmtree(tmp_path / "sweep" / "b" / "records")
    for module in ("audit", "analyze"):
        assert main(module, [f"run={tmp_path / 'sweep'}"]) == 0
        out, err = capsys.readouterr()
        assert f"left out: {tmp_path / 'sweep' / 'b'}: has no records" in err
        assert f"{tmp_path / 'sweep' / 'c'}" in out
    for name in "ac":
        shutil.rmtree(tmp_path / "sweep" / name / "records")
    assert main("audit", [f"run={tmp_path / 'sweep'}"]) == 2
    assert "none of these 3 runs has records" in capsys.readouterr().err


def test_a_newer_schema_is_one_clear_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = copied(run, tmp_path / "newer")
    write_table(newer, "steps", rows_of(run, "steps"), STEPS.with_metadata({"schema_version": "4"}))
    for module in ("analyze", "audit", "explain", "trace"):
        said = complaint(capsys, module, f"run={newer}", *(["row=3"] if module == "explain" else []))
        assert "schema_version=4 is newer than 3" in said
    assert main("diff", [f"a={run}", f"b={newer}"]) == 2
    _, err = capsys.readouterr()  # what the manifests say stands there already
    assert "schema_version=4 is newer than 3" in err
    assert err.count("\n") == 1
    edit_manifest(newer, lambda manifest: manifest.update(schema_version=2))
    assert "manifest.json: schema_version=2 is newer than 1" in complaint(capsys, "audit", f"run={newer}")


@pytest.mark.parametrize("metadata", [None, {"schema_version": "two"}, {"schema_version": "0"}])
def test_parquet_that_is_no_record_is_one_clear_error(
    metadata: dict[str, str] | None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(run, tmp_path / "run")
    write_table(other, "steps", rows_of(run, "steps"), STEPS.with_metadata(metadata or {}))
    assert "is no part of a flight recorder's records" in complaint(capsys, "audit", f"run={other}")


def test_a_part_that_is_cut_off_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copied(run, tmp_path / "run")
    part = min((other / "records" / "steps").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    assert f"{part}: cannot be read as Parquet" in complaint(capsys, "audit", f"run={other}")


ADDED = ["padded_num_tokens", "in_halves"]
"""To steps, by versions 2, 3, ..."""


def of_version(version: int, run: Path, directory: Path) -> Path:
    """A copy of `run` as that version would have written it."""
    older = copied(run, directory)
    fields = [field for field in STEPS if field.name not in ADDED[version - 1 :]]
    write_table(older, "steps", rows_of(run, "steps"), pa.schema(fields, {"schema_version": str(version)}))
    edit_manifest(older, lambda manifest: manifest["engine"].pop("halves", None))
    return older


def test_version_1_is_read_without_what_it_lacks(run: Path, tmp_path: Path) -> None:
    """It did not write steps.padded_num_tokens: of decode graphs it follows, of others the real tokens stand for it."""
    older = of_version(1, run, tmp_path / "older")

    before, now = RecordedRun(run).steps, RecordedRun(older).steps

    assert now.schema == before.schema
    assert now.drop_columns(ADDED).equals(before.drop_columns(ADDED))
    decodes = pa.compute.equal(before["phase"], "decode")
    column = "padded_num_tokens"
    assert now.filter(decodes)[column].equals(before.filter(decodes)[column])
    assert max(before.filter(decodes)[column].to_pylist()) > 0
    assert main("audit", [f"run={older}"]) == 0


def test_version_2_does_not_know_which_steps_ran_in_halves(run: Path, tmp_path: Path) -> None:
    older = of_version(2, run, tmp_path / "older")
    before, now = RecordedRun(run), RecordedRun(older)
    assert now.steps.schema == before.steps.schema
    assert now.steps.drop_columns("in_halves").equals(before.steps.drop_columns("in_halves"))
    assert now.steps["in_halves"].null_count == now.steps.num_rows
    assert before.steps["in_halves"].null_count == 0
    found = [next(segments(each)).in_halves for each in (before, now)]
    assert found[0].tolist() == before.steps["in_halves"].to_pylist()
    assert found[0].any()
    assert found[1].dtype == np.bool_
    assert not found[1].any()


@pytest.mark.parametrize("version", range(1, 1 + len(ADDED)))
@pytest.mark.parametrize("module", COMMANDS)
def test_every_question_can_be_asked_of_a_run_of_an_older_version(
    module: str, version: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = of_version(version, run, tmp_path / "older")
    words = {"explain": [f"run={older}", "row=3"], "diff": [f"a={older}", f"b={run}"]}
    assert main(module, words.get(module, [f"run={older}"])) == 0
    out, err = capsys.readouterr()
    assert (err, "halves" in out) == ("", False), "what is not known is not told"
    if module == "trace":
        assert "in_halves" not in (older / "trace.json").read_text()


def test_parts_of_several_versions_stand_side_by_side(resumed_run: Path, tmp_path: Path) -> None:
    """A run that a newer version went on with."""
    mixed = copied(resumed_run, tmp_path / "run")
    first, *_ = sorted((mixed / "records" / "steps").glob("*.parquet"))
    part = pq.read_table(first).drop_columns(ADDED)
    pq.write_table(part.replace_schema_metadata({"schema_version": "1"}), first)
    assert RecordedRun(mixed).steps.num_rows == RecordedRun(resumed_run).steps.num_rows
    assert RecordedRun(mixed).steps["in_halves"].null_count == part.num_rows
    assert audit(mixed).first is None


def test_the_answers_of_a_run_that_is_under_way_are_read(run: Path, tmp_path: Path) -> None:
    """Their lines may carry more keys, and the last one may be torn."""
    lines = (run / "generations.jsonl").read_bytes().splitlines(keepends=True)
    partial = tmp_path / "generations.partial.jsonl"
    more = [json.dumps({**json.loads(line), "crc32": 5}).encode() + b"\n" for line in lines[:9]]
    partial.write_bytes(b"".join(more) + lines[9][:30])

    found = read_answers(tmp_path)

    assert found.path == partial
    assert found.row.tolist() == [json.loads(line)["row"] for line in lines[:9]]
    assert found.num_token_ids.tolist() == found.num_output_tokens.tolist()


def test_a_line_that_is_broken_in_the_middle_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(run, tmp_path / "run")
    path = other / "generations.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{torn\n", *lines[4:]]))
    assert "generations.jsonl, line 4: is no JSON" in complaint(capsys, "audit", f"run={other}")


@pytest.mark.parametrize("module", COMMANDS)
def test_help_names_every_key_and_a_command_needs_no_torch(module: str) -> None:
    script = (
        "import sys\n"
        "from jobs.analysis.program import main\n"
        f"assert main({module!r}, ['--help']) == 0\n"
        "heavy = [n for n in ('torch', 'transformers', 'hydra', 'triton') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m jobs.{module} " in done.stdout


def test_a_command_reads_words_as_they_stand_and_writes_nothing_but_its_report(run: Path, tmp_path: Path) -> None:
    """As a program: commas, parentheses and quotes go through, nothing is created where it runs."""
    copy = copied(run, tmp_path / "runs" / "a=b,(c)")
    before = sorted(path for path in copy.rglob("*"))
    words = [f"run={copy}", "sql=select max(step), count(*) as n, 'a=b,(c)' as x from steps where phase in ('decode')"]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.analyze", *words],
        cwd=empty,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a=b,(c)" in done.stdout
    assert not list(empty.iterdir())
    assert sorted(path for path in copy.rglob("*")) == before
