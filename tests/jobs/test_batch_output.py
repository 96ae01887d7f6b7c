"""writer.format=openai_batch: what comes in as OpenAI Batch lines goes out as such."""

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest

from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.views import connect
from jobs.batch_output import BatchForm
from jobs.generate_job import COMMAND
from jobs.launch import launch
from tests.jobs.generate_process import Finished, generate, json_lines, write_rows

CHAT = {"model": "any", "messages": [{"role": "user", "content": "Count from 1 to 5 in steps of 1."}]}
LINES = [
    {"custom_id": "../up", "method": "POST", "url": "/v1/chat/completions", "body": CHAT | {"max_tokens": 30}},
    {"custom_id": "plain", "body": {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}},
    {"custom_id": "plain", "body": {"prompt": [5, 6, 7], "max_tokens": 1}},
    {"custom_id": "", "body": CHAT | {"temperature": 0, "max_tokens": 40, "user": "u", "metadata": {"a": "b"}}},
]
BAD: list[tuple[dict[str, Any] | bytes, str, str | None]] = [
    ({"id": "own", "prompt": "x"}, "not_batch_line", None),
    (b"no json", "not_json", None),
    ({"custom_id": "role", "body": {"messages": [{"role": "boss", "content": "x"}]}}, "bad_messages", "role"),
    ({"custom_id": "key", "body": CHAT | {"logit_bias": {}}}, "unsupported_key", "key"),
    ({"custom_id": 5, "body": CHAT}, "bad_id", None),
    ({"custom_id": "long", "body": {"prompt": [5] * 3000}}, "prompt_too_long", "long"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("batch")
    path = write_rows(directory / "in.jsonl", [*LINES, *(line for line, _, _ in BAD)])
    return generate(directory / "run", f"input={path}", "writer.format=openai_batch", "sampling.temperature=0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same rows, written in our own form."""
    directory = tmp_path_factory.mktemp("plain")
    path = write_rows(directory / "in.jsonl", LINES)
    return generate(directory / "run", f"input={path}", "sampling.temperature=0")


def test_every_answer_is_a_batch_line_of_its_request(run: Finished, plain: Finished):
    assert run.code == 3
    assert [answer["custom_id"] for answer in run.generations] == [line["custom_id"] for line in LINES]
    assert len({answer["id"] for answer in run.generations}) == len(LINES)
    for answer, own in zip(run.generations, plain.generations, strict=True):
        assert list(answer) == ["id", "custom_id", "response", "error"]
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert body["model"] == "tiny"
        assert body["usage"] == {
            "prompt_tokens": own["num_prompt_tokens"],
            "completion_tokens": own["num_output_tokens"],
            "total_tokens": own["num_prompt_tokens"] + own["num_output_tokens"],
        }
        (choice,) = body["choices"]
        assert (choice["index"], choice["finish_reason"]) == (0, own["finish_reason"])
        if body["object"] == "chat.completion":
            assert choice["message"] == {"role": "assistant", "content": own["text"]}
        else:
            assert choice["text"] == own["text"]
    assert [answer["response"]["body"]["object"] for answer in run.generations] == [
        "chat.completion",
        "text_completion",
        "text_completion",
        "chat.completion",
    ]


def test_the_view_of_generations_is_that_of_our_own_form(run: Finished, plain: Finished):
    columns = "row, sample, id, text, finish_reason, num_prompt_tokens, num_output_tokens"
    with connect([RecordedRun(run.directory)]) as connection:
        found = connection.execute(f"select {columns} from generations order by row").fetchall()
        joined = connection.execute(
            "select count(*) from generations g join requests r using (run, row, sample) "
            "where g.num_output_tokens = r.num_output_tokens"
        ).fetchone()
    assert found == [tuple(answer[name] for name in columns.split(", ")) for answer in plain.generations]
    assert joined == (len(LINES),)


def test_every_failure_is_in_the_error_file_and_in_failures_jsonl(run: Finished):
    errors = json_lines(run.directory / "batch_errors.jsonl")
    assert [failure["code"] for failure in run.failures] == [code for _, code, _ in BAD]
    for error, failure, (_, code, custom_id) in zip(errors, run.failures, BAD, strict=True):
        assert list(error) == ["id", "custom_id", "response", "error"]
        assert error["custom_id"] == custom_id
        assert error["error"]["code"] == code
        assert failure["reason"] in error["error"]["message"]
        assert f"line {failure['line']} of " in error["error"]["message"]
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["code"] == code


def test_ids_never_become_names_of_files(run: Finished):
    assert not (run.directory.parent / "up").exists()
    assert {path.name for path in run.directory.iterdir()} >= {"generations.jsonl", "batch_errors.jsonl"}


def test_the_manifest_names_all_three_files_and_a_complete_run_verifies(run: Finished):
    outputs = {output["path"]: output["num_rows"] for output in run.manifest["output"]}
    assert outputs == {"generations.jsonl": len(LINES), "failures.jsonl": len(BAD), "batch_errors.jsonl": len(BAD)}
    assert launch(COMMAND, [f"resume={run.directory}"]) == 3
    (run.directory / "batch_errors.jsonl").write_text("changed\n")
    assert launch(COMMAND, [f"resume={run.directory}"]) == 1


def test_samples_of_a_row_are_its_choices():
    def line(row: int, sample: int) -> bytes:
        record = {"row": row, "sample": sample, "id": "a", "text": f"{row}.{sample}", "finish_reason": "stop"}
        counts = {"num_prompt_tokens": 5, "num_output_tokens": 2, "logprobs": None}
        return json.dumps(record | counts | {"url": "/v1/chat/completions"}).encode()

    file = io.BytesIO()
    lines = [line(0, 0), line(0, 1), line(3, 0), line(3, 1), line(3, 2)]
    BatchForm("m", 7).write_answers(cast(Any, file), lines)
    answers = [json.loads(text)["response"]["body"] for text in file.getvalue().splitlines()]
    assert [[choice["message"]["content"] for choice in body["choices"]] for body in answers] == [
        ["0.0", "0.1"],
        ["3.0", "3.1", "3.2"],
    ]
    assert [body["usage"]["completion_tokens"] for body in answers] == [4, 6]
    assert {body["created"] for body in answers} == {7}


def test_an_input_without_batch_lines_is_refused_before_anything_begins(tmp_path: Path, capfd):
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}] * 3)
    run = generate(tmp_path / "run", f"input={path}", "writer.format=openai_batch")
    assert run.code == 2
    assert "has rows that are no OpenAI Batch lines" in capfd.readouterr().err
    assert not run.directory.exists()
