"""What cannot be answered: bad rows beside good ones, and bad configuration before anything begins."""

import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from jobs.generate_job import COMMAND
from jobs.launch import launch
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from tests.checkpoints import write_checkpoint
from tests.jobs.generate_process import Finished, Row, bundled_rows, generate, json_lines, write_rows

VOCAB = 1600
MODEL_LEN = 2048
CAPACITY = 512
"""Tokens in the KV cache of these runs: 32 blocks of 16."""
SETTINGS = ("kv.num_blocks=32", "sampling.max_tokens=16")


class Bad(NamedTuple):
    line: Row | bytes
    """The row, or its bytes."""
    code: str
    says: tuple[str, ...]
    """What the reason must hold: the value that is wrong and what would be right."""
    id: object = "bad"


BAD = {
    "not JSON": Bad(b'{"prompt": "x"', "not_json", ("truncated", '"{\\"prompt\\": \\"x\\""'), None),
    "not UTF-8": Bad(b'{"prompt": "\xff"}', "not_utf8", ("0xff", "byte 13"), None),
    "not an object": Bad(b'["x"]', "not_object", ("a list", "must be an object"), None),
    "no prompt": Bad({"id": "bad", "text": "x"}, "no_prompt", ("none of prompt, messages, prompt_token_ids",)),
    "several prompts": Bad(
        {"id": "bad", "prompt": "x", "prompt_token_ids": [5]},
        "several_prompts",
        ("prompt and prompt_token_ids", "only one"),
    ),
    "prompt of a wrong type": Bad({"id": "bad", "prompt": 5}, "bad_prompt", ("the number 5", "must be a string")),
    "messages of a wrong type": Bad(
        {"id": "bad", "messages": [{"role": "user", "content": 5}]}, "bad_messages", ("the number 5", "a string")
    ),
    "unknown role": Bad(
        {"id": "bad", "messages": [{"role": "boss", "content": "x"}]}, "bad_messages", ('"boss"', "one of system, user")
    ),
    "token ids of a wrong type": Bad(
        {"id": "bad", "prompt_token_ids": [5, "x"]}, "bad_token_ids", ("prompt_token_ids[1]", '"x"', "an integer")
    ),
    "id of a wrong type": Bad({"id": 1.5, "prompt": "x"}, "bad_id", ("1.5", "a string or an integer"), None),
    "sampling of a wrong type": Bad(
        {"id": "bad", "prompt": "x", "sampling": [1]}, "bad_sampling", ("a list", "object")
    ),
    "unknown sampling key": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"temprature": 1}},
        "unknown_sampling_key",
        ('"temprature"', "temperature, top_p"),
    ),
    "sampling out of range": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"top_p": 1.5}}, "bad_sampling", ("sampling.top_p=1.5", "at most 1")
    ),
    "a temperature that float32 cannot hold": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"temperature": 1e300}},
        "bad_sampling",
        ("temperature=1e+300", "at most"),
    ),
    "sampling value of a wrong type": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"max_tokens": "9"}}, "bad_sampling", ("max_tokens", "an integer")
    ),
    "NaN": Bad(b'{"id": "bad", "prompt": "x", "sampling": {"min_p": NaN}}', "bad_number", ("NaN", "null"), None),
    "lone surrogate": Bad(b'{"id": "bad", "prompt": "x\\ud800"}', "lone_surrogate", ("\\ud800",), None),
    "empty prompt": Bad({"id": "bad", "prompt": ""}, "empty_prompt", ("an empty string",)),
    "no token ids": Bad({"id": "bad", "prompt_token_ids": []}, "empty_prompt", ("an empty list",)),
    "id beyond the vocabulary": Bad(
        {"id": "bad", "prompt_token_ids": [5, VOCAB]}, "token_id_out_of_range", (str(VOCAB), f"0 to {VOCAB - 1}")
    ),
    "negative id": Bad({"id": "bad", "prompt_token_ids": [-1]}, "bad_token_ids", ("-1", "from 0")),
    "longer than the model": Bad(
        {"id": "bad", "prompt_token_ids": [5] * MODEL_LEN},
        "prompt_too_long",
        (f"{MODEL_LEN} tokens", f"engine.max_model_len={MODEL_LEN}"),
    ),
    "prompt larger than the cache": Bad(
        {"id": "bad", "prompt_token_ids": [5] * CAPACITY},
        "exceeds_kv_cache",
        ("33 KV blocks", "has 32", "kv.num_blocks"),
    ),
    "output larger than the cache": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"max_tokens": 1000}}, "exceeds_kv_cache", ("has 32", "max_tokens")
    ),
    "stop id beyond the vocabulary": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"stop_token_ids": [VOCAB]}},
        "token_id_out_of_range",
        ("stop_token_ids", str(VOCAB)),
    ),
    "stop ids of a wrong type": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"stop_token_ids": ["a"]}}, "bad_sampling", ("stop_token_ids=['a']",)
    ),
    "a template that refuses": Bad(
        {"id": "bad", "messages": [{"role": "tool", "content": "x"}]}, "chat_template", ("unknown role", "use system")
    ),
    "tools that are none": Bad(
        {"id": "bad", "messages": [{"role": "user", "content": "x"}], "tools": ["f"]},
        "bad_tools",
        ("tools[0]", "must be"),
    ),
    "a template variable with a name of its own": Bad(
        {"id": "bad", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": []}},
        "bad_chat_option",
        ("chat_template_kwargs has tools",),
    ),
    "nothing to continue": Bad(
        {"id": "bad", "messages": [{"role": "assistant", "content": ""}], "continue_final_message": True},
        "bad_chat_option",
        ("continue_final_message", "no content"),
    ),
    "a template's option beside a prompt": Bad(
        {"id": "bad", "prompt": "x", "continue_final_message": True},
        "options_need_messages",
        ("continue_final_message goes to a chat template", "messages"),
    ),
    "an id that is too long": Bad(
        {"id": "x" * 5000, "prompt": "x"}, "field_too_long", ("id has 5,000 characters", "at most 4,096"), None
    ),
    "a prompt that is too long to be read": Bad(
        {"id": "bad", "prompt": "x" * (2**20 + 1)}, "field_too_long", ("1,048,577 characters", "at most 1,048,576")
    ),
    "a conversation that is too long to be tokenised": Bad(
        {"id": "bad", "messages": [{"role": "user", "content": "x" * 2**20}] * 3},
        "prompt_too_large",
        ("the prompt's text has more than 2,097,152 bytes",),
    ),
    "too many stop strings": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"stop": ["x"] * 300}},
        "field_too_long",
        ("300 entries", "at most 256"),
    ),
    "no output": Bad({"id": "bad", "prompt": "x", "sampling": {"max_tokens": 0}}, "bad_sampling", ("max_tokens=0",)),
    "a negative stop id": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"stop_token_ids": [-1]}}, "bad_sampling", ("stop_token_ids=[-1]",)
    ),
    "a stop id beyond 32 bits": Bad(
        {"id": "bad", "prompt": "x", "sampling": {"stop_token_ids": [2**63]}}, "bad_sampling", ("stop_token_ids=",)
    ),
    "nested too deep": Bad(
        b'{"id": "bad", "prompt": "x", "y": ' + b"[" * 200 + b"]" * 200 + b"}", "too_deep", ("100 lists",), None
    ),
    "a line that is too long": Bad(
        b'{"id": "bad", "prompt": "' + b"x" * (16 * 2**20) + b'"}', "line_too_long", ("16,777,216 bytes",), None
    ),
    "a Batch line with an unknown key": Bad(
        {"custom_id": "bad", "body": {"prompt": "x", "logit_bias": {}}},
        "unsupported_key",
        ('"logit_bias"', "supported"),
    ),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Finished]:
    """A run over a good row before each kind of bad one, and a run over the good rows alone."""
    directory = tmp_path_factory.mktemp("bad")
    good = bundled_rows(len(BAD))
    lines: list[Row | bytes] = [
        line for pair in zip(good, (bad.line for bad in BAD.values()), strict=True) for line in pair
    ]
    both = write_rows(directory / "both.jsonl", lines)
    alone = write_rows(directory / "good.jsonl", good)
    return (
        generate(directory / "both", f"input={both}", *SETTINGS),
        generate(directory / "alone", f"input={alone}", *SETTINGS),
    )


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_fails_with_its_place_code_and_reason(kind: str, mixed: tuple[Finished, Finished]):
    index, bad = list(BAD).index(kind), BAD[kind]
    run, _ = mixed
    failure = run.failures[index]
    row = 2 * index + 1
    place = {"file": str(run.directory.parent / "both.jsonl"), "line": row + 1, "row": row}
    assert list(failure) == ["file", "line", "row", "id", "code", "reason"]
    assert failure == {**place, "id": bad.id, "code": bad.code, "reason": failure["reason"]}
    missing = [part for part in bad.says if part not in failure["reason"]]
    assert missing == [], failure["reason"]


def test_bad_rows_leave_the_good_ones_as_they_are_without_them(mixed: tuple[Finished, Finished]):
    both, alone = mixed
    assert (both.code, alone.code) == (3, 0)
    assert len(both.failures) == len(BAD)
    assert [row["row"] for row in both.generations] == list(range(0, 2 * len(BAD), 2))
    assert [rest(row) for row in both.generations] == [rest(row) for row in alone.generations]


def rest(row: Row) -> bytes:
    """The row's line, but for its number."""
    return json.dumps({key: value for key, value in row.items() if key != "row"}).encode()


def test_b35_b37_every_length_at_the_models_limit_has_its_outcome(tmp_path: Path):
    limit = 256
    lengths = {"M-2": limit - 2, "M-1": limit - 1, "M": limit, "M+1": limit + 1}
    rows: list[Row] = [{"id": name, "prompt_token_ids": [5] * length} for name, length in lengths.items()]
    rows += [{"id": f"max_tokens {n}", "prompt": "x", "sampling": {"max_tokens": n}} for n in (1, None)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    words = [f"engine.max_model_len={limit}", "sampling.ignore_eos=true", "kv.num_blocks=300", "seed=1"]
    run = generate(tmp_path / "run", f"input={path}", *words)
    outcome = {row["id"]: (row["finish_reason"], row["num_output_tokens"]) for row in run.generations}
    assert outcome == {
        "M-2": ("length", 2),
        "M-1": ("length", 1),
        "max_tokens 1": ("length", 1),
        "max_tokens None": ("length", limit - 1),
    }
    assert {row["id"]: row["code"] for row in run.failures} == {"M": "prompt_too_long", "M+1": "prompt_too_long"}


def test_the_manifest_counts_failed_rows(mixed: tuple[Finished, Finished]):
    manifest = mixed[0].manifest
    assert (manifest["status"], manifest["exit_code"]) == ("complete", 3)
    counts = manifest["counts"]
    assert sum(counts.pop("failed_by_code").values()) == len(BAD)
    assert counts == {"rows": 2 * len(BAD), "answered": len(BAD), "failed": len(BAD)}
    assert manifest["input"][0]["num_rows"] == 2 * len(BAD)
    assert {output["path"]: output["num_rows"] for output in manifest["output"]} == {
        "generations.jsonl": len(BAD),
        "failures.jsonl": len(BAD),
    }


def test_the_progress_counts_failed_rows_as_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}, {"id": 1}, {"id": 2}])
    assert generate(tmp_path / "run", f"input={path}", "progress=auto", *SETTINGS).code == 3
    assert "progress: 3/3 rows" in capfd.readouterr().err
    path = write_rows(tmp_path / "bad.jsonl", [{"id": 1}, {"id": 2}])
    assert generate(tmp_path / "bad", f"input={path}", "progress=auto", *SETTINGS).code == 3
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("progress: ")]
    assert line.startswith("progress: 2/2 rows, 0 output tokens in ")
    assert line.endswith(", 2 failed")


def test_more_failures_than_allowed_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}, {"id": 1}, {"prompt": "y"}, {"id": "two"}])
    run = generate(tmp_path / "run", f"input={path}", "reader.max_failures=1", *SETTINGS)
    assert run.code == 1
    complaint = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    for part in ("more than reader.max_failures=1 rows failed", "row 3", "line 4", "none of prompt", "run.log"):
        assert part in complaint
    assert run.manifest["status"] == "failed"
    assert "max_failures=1" in run.manifest["error"]
    assert "Traceback" in run.log
    assert "TooManyFailures" in run.log
    assert [row["id"] for row in run.failures] == [1, "two"]
    assert {row["finish_reason"] for row in run.table("requests")} == {"aborted"}


def test_as_many_failures_as_allowed_do_not_end_the_run(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}, {"id": 1}])
    assert generate(tmp_path / "run", f"input={path}", "reader.max_failures=1", *SETTINGS).code == 3


# Rows that fail in the engine


def test_a_row_whose_logits_are_not_finite_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_rows(tmp_path / "rows.jsonl", bundled_rows(4))
    words = (f"input={path}", "sampling.max_tokens=8", "sampling.ignore_eos=true")
    healthy = generate(tmp_path / "healthy", *words)
    original = Qwen3ForCausalLM.sample
    calls = iter(range(100))

    def poisoned(self: Qwen3ForCausalLM, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        if next(calls) == 3:  # the fourth step: all four rows are in the batch, in input order
            hidden[1] = torch.nan
        return original(self, hidden, *rest)

    monkeypatch.setattr(Qwen3ForCausalLM, "sample", poisoned)
    run = generate(tmp_path / "sick", *words)
    assert run.code == 3
    (failure,) = run.failures
    assert (failure["row"], failure["line"], failure["code"]) == (1, 2, "logits_not_finite")
    assert "not finite after 3 output tokens" in failure["reason"]
    assert run.generations == [row for row in healthy.generations if row["row"] != 1]
    reasons = {row["row"]: (row["finish_reason"], row["num_output_tokens"]) for row in run.table("requests")}
    assert reasons == {0: ("length", 8), 1: ("error", 3), 2: ("length", 8), 3: ("length", 8)}


def test_a_model_that_falls_over_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = bundled_rows(3)
    rows[1]["sampling"] = {"max_tokens": 2}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    original = Qwen3ForCausalLM.sample
    calls = iter(range(100))

    def falling(self: Qwen3ForCausalLM, *given: Any) -> torch.Tensor:
        if next(calls) == 5:
            raise RuntimeError("the device is gone")
        return original(self, *given)

    monkeypatch.setattr(Qwen3ForCausalLM, "sample", falling)
    run = generate(tmp_path / "run", f"input={path}", "sampling.max_tokens=8", "sampling.ignore_eos=true")
    assert run.code == 1
    assert (run.manifest["status"], run.manifest["error"]) == ("failed", "RuntimeError: the device is gone")
    assert "Traceback" in run.log
    assert "the device is gone" in run.log
    assert [row["row"] for row in json_lines(run.directory / "generations.partial.jsonl")] == [1]
    ended = {row["row"]: row["finish_reason"] for row in run.table("requests")}
    assert ended == {1: "length", 0: "aborted", 2: "aborted"}
    assert run.manifest["counts"]["answered"] == 1
    assert run.manifest["figures"]["num_steps"] == 5
    assert [step["step"] for step in run.table("steps")] == list(range(5)), "all that were committed"


def test_a_model_without_a_tokenizer_answers_token_ids_alone(tmp_path: Path):
    model = tmp_path / "model"
    write_checkpoint(model)
    (model / "model.safetensors").unlink()  # dummy weights need none
    rows: list[Row] = [
        {"id": "ids", "prompt_token_ids": [5, 6, 7]},
        {"id": "text", "prompt": "x"},
        {"id": "chat", "messages": [{"role": "user", "content": "x"}]},
        {"id": "stop", "prompt_token_ids": [5], "sampling": {"stop": ["x"]}},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    words = [f"input={path}", f"model.path={model}", "model.load_format=dummy", "kv.num_blocks=64"]
    run = generate(tmp_path / "run", *words, "sampling.max_tokens=5", "sampling.ignore_eos=true")
    assert run.code == 3
    (answer,) = run.generations
    assert (answer["id"], answer["text"], answer["num_output_tokens"]) == ("ids", None, 5)
    assert [(row["id"], row["code"]) for row in run.failures] == [
        (name, "no_tokenizer") for name in ("text", "chat", "stop")
    ]
    assert all("prompt_token_ids" in row["reason"] for row in run.failures)
    assert run.manifest["model"]["files"].keys() == {"config.json"}


# Configuration and input that cannot be: exit code 2, one message, no directory


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty, beside the files that the words name."""
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    (tmp_path / "rows.json").write_text('[{"prompt": "x"}]')
    (tmp_path / "fake.parquet").write_text("no parquet")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "folder").mkdir()
    write_checkpoint(tmp_path / "truncated", tokenizer=True)
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_checkpoint(tmp_path / "short")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sampling.temprature=1"], ["sampling.temprature=1: no such key", "sampling.temperature?"]),
        (["kv.block_size=big"], ["kv.block_size=big: must be an integer"]),
        (["sampling.top_p=0"], ["sampling.top_p=0.0: must be a number, above 0 and at most 1"]),
        (["input=../missing.jsonl"], ["input=../missing.jsonl: no such file", "the working directory is"]),
        (["input=../*.txt"], ["input=../*.txt: no file matches"]),
        (["input=../folder"], ["input=../folder: is a directory", "*.jsonl"]),
        (["input=../rows.csv"], ["input=../rows.csv: is not JSONL", '{"prompt": "..."}']),
        (["input=../rows.json"], ["a JSON array", "jq -c"]),
        (["input=../fake.parquet"], ["input=../fake.parquet: is not a Parquet file"]),
        (["model.path=../folder"], ["model.path=../folder: no config.json", "Hugging Face"]),
        (["model.path=../rows.jsonl"], ["model.path=../rows.jsonl: is a file"]),
        (["model.path=./nowhere"], ["model.path=./nowhere: no such directory"]),
        (["model.path=../truncated"], ["model.path=../truncated", "model.safetensors"]),
        (["engine.max_model_len=4096"], ["engine.max_model_len=4096: must be at most 2048"]),
        (["model.path=../short", "engine.max_model_len=513"], ["engine.max_model_len=513: must be at most 512"]),
        (["writer.keep=[text]"], ["writer.keep=text", "the output has a column of this name"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_begin_is_one_message_exit_code_2_and_no_directory(
    words: list[str], says: list[str], empty: Path, capfd: pytest.CaptureFixture[str]
):
    assert launch(COMMAND, words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    for part in says:
        assert part in err
    assert list(empty.iterdir()) == [], "no directory is left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_ends_the_run_before_it_leaves_anything(
    empty: Path, capfd: pytest.CaptureFixture[str]
):
    assert launch(COMMAND, ["device=cuda", "reader.limit=1"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "device=cuda" in errors[0]
    assert "device=cpu" in errors[0], "the cure is named"
    assert list(empty.iterdir()) == []


def test_standard_input_that_is_no_jsonl_leaves_nothing(
    empty: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a,b\n1,2\n")))
    assert launch(COMMAND, ["input=-"]) == 2
    assert "input=-: is not JSONL" in capfd.readouterr().err
    assert list(empty.iterdir()) == []


def test_a_cache_that_no_machine_can_hold_is_a_mistake_in_the_settings(empty: Path, capfd: pytest.CaptureFixture[str]):
    assert launch(COMMAND, ["kv.num_blocks=100000000000", "reader.limit=1"]) == 2
    assert "kv.num_blocks=100000000000" in capfd.readouterr().err
    assert list(empty.iterdir()) == []


def test_a_jobs_stop_id_beyond_the_vocabulary_is_a_mistake_in_the_settings(empty: Path):
    assert launch(COMMAND, ["sampling.stop_token_ids=[1600]", "reader.limit=1"]) == 2
    assert list(empty.iterdir()) == []
