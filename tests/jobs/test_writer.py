import errno
import hashlib
import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import jobs.writer
from jobs.line_index import RowLogError
from jobs.rows import BadRow
from jobs.writer import FailureWriter, Generation, GenerationWriter, OutputFile, check_keep

OWN = [
    "row",
    "sample",
    "id",
    "text",
    "token_ids",
    "finish_reason",
    "num_prompt_tokens",
    "num_output_tokens",
    "logprobs",
]


def generation(row: int, sample: int = 0, **values) -> Generation:
    standard = {
        "id": row,
        "text": f"text {row}",
        "token_ids": [row, 2],
        "finish_reason": "stop",
        "num_prompt_tokens": 5,
    }
    return Generation(row=row, sample=sample, **(standard | values))


def failure(row: int, **values) -> BadRow:
    standard = {"file": "in.jsonl", "line": row + 1, "id": None, "code": "not_json", "reason": "because"}
    return BadRow(row=row, **(standard | values))


def write(writer: GenerationWriter | FailureWriter, *rows: Generation | BadRow) -> None:
    writer.add([writer.encode(row) for row in rows])  # type: ignore[arg-type]


def partial_rows(path: Path) -> list[int]:
    return [record["row"] for record in records(path)]


def records(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == "", "the last line has its line break"
    return [json.loads(line, parse_constant=refuse) for line in lines]


def parquet_records(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_a_generation_is_one_line_with_the_columns_of_the_contract(tmp_path: Path) -> None:
    with GenerationWriter(tmp_path, keep=["answer", "missing"]) as writer:
        write(writer, generation(4, 1, id="ä", text="Grüße \u2028 😀\n\x00", columns={"answer": [1, None], "other": 1}))
        writer.flush()
        output = writer.finish()
    line = output.path.read_bytes()
    (record,) = records(output.path)
    assert list(record) == [*OWN, "answer", "missing"]
    assert record == {
        "row": 4,
        "sample": 1,
        "id": "ä",
        "text": "Grüße \u2028 😀\n\x00",
        "token_ids": [4, 2],
        "finish_reason": "stop",
        "num_prompt_tokens": 5,
        "num_output_tokens": 2,
        "logprobs": None,
        "answer": [1, None],
        "missing": None,
    }
    assert "Grüße \u2028 😀".encode() in line, "text is UTF-8, not ASCII escapes"
    assert output == OutputFile(
        path=tmp_path / "generations.jsonl",
        num_rows=1,
        num_bytes=len(line),
        sha256=hashlib.sha256(line).hexdigest(),
    )


def test_text_may_be_null_and_nan_becomes_null(tmp_path: Path) -> None:
    with GenerationWriter(tmp_path, keep=["x"]) as writer:
        write(writer, generation(0, text=None, columns={"x": float("nan")}))
        writer.flush()
        (record,) = records(writer.finish().path)
    assert (record["text"], record["x"]) == (None, None)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_stand_in_input_order_however_they_finished(tmp_path: Path, format: str) -> None:
    keys = [(row, sample) for row in range(0, 900, 3) for sample in range(3)]
    finished = random.Random(0).sample(keys, len(keys))
    with GenerationWriter(tmp_path, format) as writer:
        for position, (row, sample) in enumerate(finished):
            write(writer, generation(row, sample, text="x" * (position % 50)))
            if position % 7 == 0:
                writer.flush()
        writer.flush()
        output = writer.finish()
        writer.remove_log()
    rows = records(output.path) if format == "jsonl" else parquet_records(output.path)
    assert [(row["row"], row["sample"]) for row in rows] == keys
    assert all(row["token_ids"] == [row["row"], 2] for row in rows)
    assert output.num_rows == len(keys)
    assert [path.name for path in tmp_path.iterdir()] == [f"generations.{format}"]


def test_finished_rows_can_be_read_while_the_job_runs(tmp_path: Path) -> None:
    partial = tmp_path / "generations.partial.jsonl"
    with GenerationWriter(tmp_path, "parquet") as writer:
        for number, row in enumerate([5, 3, 4]):
            write(writer, generation(row))
            assert writer.num_flushed == number
            writer.flush()
            assert [record["row"] for record in records(partial)] == [5, 3, 4][: number + 1]
            assert writer.num_flushed == number + 1
        assert not (tmp_path / "generations.parquet").exists()


def test_close_without_finish_leaves_what_was_flushed_in_the_partial_file(tmp_path: Path) -> None:
    writer = GenerationWriter(tmp_path)
    write(writer, generation(1))
    writer.flush()
    write(writer, generation(0))
    writer.close()
    writer.close()
    assert partial_rows(tmp_path / "generations.partial.jsonl") == [1]
    assert not (tmp_path / "generations.jsonl").exists()
    with pytest.raises(ValueError, match="is closed"):
        write(writer, generation(2))


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_job_without_answers_has_an_empty_output(tmp_path: Path, format: str) -> None:
    with GenerationWriter(tmp_path, format, ["x"]) as writer:
        output = writer.finish()
    assert output.num_rows == 0
    if format == "parquet":
        assert pq.read_schema(output.path).names == [*OWN, "x"]
    else:
        assert output.path.read_bytes() == b""


def test_parquet_and_jsonl_have_the_same_content(tmp_path: Path) -> None:
    keep = ["text_column", "number", "flag", "nothing"]
    outputs = []
    for format in ("jsonl", "parquet"):
        (tmp_path / format).mkdir()
        with GenerationWriter(tmp_path / format, format, keep) as writer:
            for row in range(1000):
                kept = {"text_column": f"ü{row}", "number": row / 2, "flag": row % 2 == 0, "nothing": None}
                write(writer, generation(999 - row, id=-row, text=None if row % 3 else "Ü", columns=kept))
            writer.flush()
            outputs.append(writer.finish().path)
    assert records(outputs[0]) == parquet_records(outputs[1])


def test_parquet_columns_have_stable_types(tmp_path: Path) -> None:
    with GenerationWriter(tmp_path, "parquet") as writer:
        write(writer, generation(0, id=1))
        writer.flush()
        schema = pq.read_schema(writer.finish().path)
    types = [str(schema.field(name).type) for name in OWN]
    assert types == [
        "int64",
        "int32",
        "int64",
        "string",
        "list<element: int32>",
        "string",
        "int32",
        "int32",
        "null",
    ]
    assert schema.metadata[b"schema_version"] == b"1"


def test_parquet_ids_are_strings_as_soon_as_one_is(tmp_path: Path) -> None:
    with GenerationWriter(tmp_path, "parquet") as writer:
        for row, given in enumerate([12, "a", -3]):
            write(writer, generation(row, id=given))
        writer.flush()
        assert [record["id"] for record in parquet_records(writer.finish().path)] == ["12", "a", "-3"]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", None, "b"], "string", ["a", None, "b"]),
        ([1, None, 2**63 - 1], "int64", [1, None, 2**63 - 1]),
        ([1, 0.5, None], "double", [1.0, 0.5, None]),
        ([True, None, False], "bool", [True, None, False]),
        ([None, None, None], "string", [None, None, None]),
        ([2**63 - 1, 0.5, None], "string", ["9223372036854775807", "0.5", None]),
        ([2**64, 1, -(10**30)], "string", [str(2**64), "1", str(-(10**30))]),
        ([True, 1, None], "string", ["true", "1", None]),
        (["a", 1, None], "string", ['"a"', "1", None]),
        ([["ü"], {"b": None}, None], "string", ['["ü"]', '{"b":null}', None]),
    ],
)
def test_a_kept_column_has_the_type_of_its_values_or_is_json(
    tmp_path: Path, values: list, kind: str, expected: list
) -> None:
    with GenerationWriter(tmp_path, "parquet", ["x"]) as writer:
        for row, value in enumerate(values):
            write(writer, generation(row, columns={"x": value}))
        writer.flush()
        path = writer.finish().path
    assert str(pq.read_schema(path).field("x").type) == kind
    assert [record["x"] for record in parquet_records(path)] == expected


def test_a_kept_column_must_not_have_an_own_name(tmp_path: Path) -> None:
    for name in OWN:
        with pytest.raises(ValueError, match=rf"writer\.keep={name}: the output has a column of this name"):
            check_keep(["fine", name])
    with pytest.raises(ValueError, match=r"writer\.keep=a: named twice"):
        GenerationWriter(tmp_path, keep=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"writer\.format=csv: must be one of jsonl, parquet"):
        GenerationWriter(tmp_path, "csv")
    assert list(tmp_path.iterdir()) == []


def test_our_own_mistakes_are_found(tmp_path: Path) -> None:
    with GenerationWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="finish_reason='error'"):
            write(writer, generation(0, finish_reason="error"))
        for sample in (0, 1, 0):
            write(writer, generation(3, sample))
        writer.flush()
        with pytest.raises(RowLogError, match="row 3, sample 0 was written twice"):
            writer.finish()
    assert len(records(tmp_path / "generations.partial.jsonl")) == 3
    assert not (tmp_path / "generations.jsonl").exists()


def test_a_partial_file_of_another_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "generations.partial.jsonl").write_text("theirs")
    with pytest.raises(FileExistsError):
        GenerationWriter(tmp_path)
    assert (tmp_path / "generations.partial.jsonl").read_text() == "theirs"


@pytest.mark.parametrize("torn", [0, 40])
def test_a_full_disk_raises_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: int) -> None:
    real_write = os.write

    def full(file: int, data: memoryview) -> int:
        if torn and len(data) > torn:
            return real_write(file, data[: len(data) - torn])
        raise OSError(errno.ENOSPC, "No space left on device")

    with GenerationWriter(tmp_path) as writer:
        write(writer, generation(0))
        writer.flush()
        write(writer, generation(1), generation(2))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            writer.flush()
        monkeypatch.undo()
        assert writer.num_flushed == 1
        for attempt in (writer.flush, writer.finish, lambda: write(writer, generation(3))):
            with pytest.raises(OSError, match="an earlier write failed"):
                attempt()
    assert partial_rows(tmp_path / "generations.partial.jsonl") == [0]


def test_after_a_sync_that_failed_nothing_is_acknowledged_or_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with GenerationWriter(tmp_path) as writer:
        write(writer, generation(0))
        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            writer.flush()
        monkeypatch.undo()
        assert writer.num_flushed == 0
        with pytest.raises(OSError, match="an earlier write failed"):
            writer.flush()


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_end_leaves_the_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, name: str
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with GenerationWriter(tmp_path, format) as writer:
        write(writer, generation(0))
        writer.flush()
        monkeypatch.setattr(os, name, broken)
        with pytest.raises(OSError, match="Input/output error"):
            writer.finish()
        monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["generations.partial.jsonl"]
    assert partial_rows(tmp_path / "generations.partial.jsonl") == [0]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_final_file_is_verified_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    counter = "_count_lines" if format == "jsonl" else "count_parquet_rows"
    monkeypatch.setattr(jobs.writer, counter, lambda path: 0)
    with GenerationWriter(tmp_path, format) as writer:
        write(writer, generation(0))
        writer.flush()
        with pytest.raises(OSError, match="1 rows were written, but 0 are in the file"):
            writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["generations.partial.jsonl"]


def test_a_partial_file_that_somebody_shortened_is_noticed(tmp_path: Path) -> None:
    with GenerationWriter(tmp_path) as writer:
        write(writer, generation(0))
        writer.flush()
        os.truncate(tmp_path / "generations.partial.jsonl", 10)
        with pytest.raises(OSError, match="somebody has shortened it"):
            writer.finish()


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_memory_stays_flat_over_100_000_rows(tmp_path: Path, format: str) -> None:
    num_rows = 100_000
    writer = GenerationWriter(tmp_path, format, ["answer"], power=False)
    order = [block * 100 + row for block in range(num_rows // 100) for row in reversed(range(100))]
    tracemalloc.start()
    for number, row in enumerate(order):
        write(writer, generation(row, columns={"answer": "x"}))
        if number % 8 == 7:
            writer.flush()
    writer.flush()
    written = tracemalloc.get_traced_memory()[0]
    output = writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert output.num_rows == num_rows
    assert written < 2 * num_rows, "nothing that grows with the rows"
    assert peak < (12 if format == "jsonl" else 90) * 1024 * 1024, "bounded by a chunk and a row group, not by the rows"


# Failures


def test_a_failure_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    with FailureWriter(tmp_path) as failures:
        write(failures, failure(3, id="ä", reason="lone \ud800 in ü"))
        failures.flush()
        assert records(failures.finish().path) == [
            {
                "file": "in.jsonl",
                "line": 4,
                "row": 3,
                "id": "ä",
                "code": "not_json",
                "reason": "lone \\ud800 in ü",
            }
        ]
        assert (failures.num_flushed, dict(failures.codes)) == (1, {"not_json": 1})


def test_failures_stand_in_row_order_at_the_end(tmp_path: Path) -> None:
    rows = random.Random(0).sample(range(500), 300)
    with FailureWriter(tmp_path) as failures:
        for row in rows:
            write(failures, failure(row, id=row))
        failures.flush()
        assert partial_rows(tmp_path / "failures.partial.jsonl") == rows
        output = failures.finish()
        failures.remove_log()
    assert partial_rows(output.path) == sorted(rows)
    assert output.num_rows == 300
    assert output.sha256 == hashlib.sha256(output.path.read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["failures.jsonl"]


def test_no_failures_leave_an_empty_file(tmp_path: Path) -> None:
    with FailureWriter(tmp_path) as failures:
        assert failures.finish().num_rows == 0
    assert (tmp_path / "failures.jsonl").read_bytes() == b""
