"""The generate job from a user's seat: what a run leaves, what answers hold, and what does not change them."""

import contextlib
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from jobs.generate_job import BUNDLED_PROMPTS
from nanovllm.models.source import resolve_model
from tests.engine.ledger import Ledger
from tests.jobs.generate_process import (
    ROOT,
    TABLES,
    Finished,
    assert_sound,
    block_events,
    bundled_rows,
    generate,
    json_lines,
    read_table,
    replayed,
    start,
    write_rows,
)

COLUMNS = [
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
STOP_IDS = {0, 2}
"""The tiny model's ends of sequence."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("tiny").directory)


# A first run, as a process of its own


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, str, str]:
    """`python -m jobs.generate reader.limit=12` in an empty directory, under a lax umask; with stdout and stderr."""
    cwd = tmp_path_factory.mktemp("first")
    before = os.umask(0o022)
    try:
        process = start(cwd, "reader.limit=12")
    finally:
        os.umask(before)
    out, err = process.communicate(timeout=120)
    (directory,) = cwd.glob("outputs/*/*")
    assert_sound(directory)
    return Finished(directory, process.returncode), out, err


def test_a_first_run_leaves_exactly_the_files_of_the_contract(first_run: tuple[Finished, str, str]):
    run, _, err = first_run
    assert run.code == 0, err
    assert directory_files(run.directory) == {
        "manifest.json",
        "run.log",
        "lock",
        "progress.json",
        "generations.jsonl",
        "failures.jsonl",
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        ".hydra/hydra.yaml",
        *(f"records/{table}/*.parquet" for table in TABLES),
    }
    assert run.directory.name.endswith("_tiny")
    assert run.failures == []


def directory_files(directory: Path) -> set[str]:
    files = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    return {str(path.parent / "*.parquet") if path.suffix == ".parquet" else str(path) for path in files}


def test_a_first_run_ends_with_a_summary_on_stdout_and_its_log_on_stderr(first_run: tuple[Finished, str, str]):
    run, out, err = first_run
    shown = dict(line.split(maxsplit=1) if " " in line else (line, "") for line in out.splitlines())
    figures = run.manifest["figures"]
    assert out.splitlines()[0].split() == ["run", "directory", str(run.directory.relative_to(run.directory.parents[2]))]
    assert shown["rows"] == "12 answered, 0 failed"
    assert shown["tokens"] == f"{figures['num_prompt_tokens']:,} in, {figures['num_output_tokens']:,} out"
    assert shown["speed"].startswith(f"{figures['output_tokens_per_s']:,.0f} output tok/s over ")
    assert "of the prompt tokens were cached" in out
    assert shown["preemptions"] == "0"
    answered, _, asked = shown["score"].removeprefix("answered ").removesuffix(" correctly").partition(" of ")
    assert int(asked) == 12
    assert int(answered) >= 11, "the shipped model answers its own tasks"
    assert "Initializing LLMEngine" in err
    assert "progress: 12/12 rows" in err, "no bar where there is no terminal"
    logged = [line for line in err.splitlines() if not line.startswith("progress: ")]
    assert logged == run.log.splitlines(), "run.log holds the same lines as the terminal"


def test_a_first_run_is_readable_by_its_owner_alone(first_run: tuple[Finished, str, str]):
    run, _, _ = first_run
    outputs = run.directory.parents[1]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (outputs, *outputs.rglob("*"))}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_the_manifest_says_what_ran_on_what_and_with_which_result(first_run: tuple[Finished, str, str]):
    run, _, _ = first_run
    manifest = run.manifest
    assert (manifest["status"], manifest["exit_code"], manifest["error"]) == ("complete", 0, None)
    assert manifest["command"] == ["python", "-m", "jobs.generate", "reader.limit=12"]
    assert manifest["config"]["kv"]["block_size"] == 16, "the resolved configuration, defaults included"
    assert manifest["config"]["reader"]["limit"] == 12
    assert manifest["versions"]["torch"]
    assert manifest["engine"]["num_kv_blocks"] > 0
    template = resolve_model("tiny").directory / "chat_template.jinja"  # pyright: ignore[reportOptionalOperand]
    assert manifest["chat_template"] == {"sha256": hashlib.sha256(template.read_bytes()).hexdigest()}
    assert {"host", "processor", "gpu_driver"} <= set(manifest["machine"])
    assert manifest["counts"] == {"rows": 12, "answered": 12, "failed": 0, "failed_by_code": {}}
    assert manifest["figures"]["num_output_tokens"] == sum(row["num_output_tokens"] for row in run.generations)
    assert manifest["figures"]["num_prompt_tokens"] == sum(row["num_prompt_tokens"] for row in run.generations)
    assert manifest["figures"]["num_steps"] == len(run.table("steps"))


def test_the_manifest_times_the_phases_one_after_the_other(first_run: tuple[Finished, str, str]):
    (attempt,) = first_run[0].manifest["attempts"]
    assert [phase["name"] for phase in attempt["phases"]] == ["load", "generate", "write", "finish"]
    times = [time for phase in attempt["phases"] for time in (phase["start_ns"], phase["end_ns"])]
    assert times == sorted(times)
    steps = first_run[0].table("steps")
    generating = attempt["phases"][1]
    assert generating["start_ns"] <= steps[0]["start_ns"]
    assert steps[-1]["end_ns"] <= generating["end_ns"]


def test_the_manifest_holds_the_hashes_of_model_input_and_output(first_run: tuple[Finished, str, str]):
    run, _, _ = first_run
    manifest = run.manifest
    directory = resolve_model("tiny").directory
    assert directory is not None
    files = manifest["model"]["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= files.keys()
    for name, facts in files.items():
        data = (directory / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name
    read = b"".join(BUNDLED_PROMPTS.read_bytes().splitlines(keepends=True)[:12])
    assert manifest["input"] == [
        {
            "path": str(BUNDLED_PROMPTS),
            "num_rows": 12,
            "num_bytes": len(read),
            "sha256": hashlib.sha256(read).hexdigest(),
        }
    ]
    assert [(output["path"], output["num_rows"]) for output in manifest["output"]] == [
        ("generations.jsonl", 12),
        ("failures.jsonl", 0),
    ]
    for output in manifest["output"]:
        data = (run.directory / output["path"]).read_bytes()
        assert (output["num_bytes"], output["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_nothing_before_the_run_begins_imports_torch(tmp_path: Path):
    words = [["--help"], ["--cfg", "job"], ["modle=x"], ["input=missing"], ["engine.max_model_len=9999"]]
    code = (
        "import sys; from jobs.launch import launch; from jobs.generate_job import COMMAND\n"
        f"codes = [launch(COMMAND, words) for words in {words}]\n"
        "assert codes == [0, 0, 2, 2, 2], codes\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_stdout_that_has_gone_away_does_not_make_the_run_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        run = generate(tmp_path / "run", "reader.limit=1", "sampling.max_tokens=2")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            nobody_reads.close()
    assert (run.code, run.manifest["status"]) == (0, "complete")


# Answer rows


def mixed_rows() -> list[dict[str, object]]:
    """Every form of a prompt, ids of every kind, and sampling of all kinds."""
    chat = [{"role": "user", "content": "What is 17 + 25?"}]
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "What is 17 + 25?"}]}]
    return [
        {"id": "a", "prompt": "Count from 1", "note": "x"},
        {"id": "a", "messages": chat, "note": None},
        {"id": 7, "prompt_token_ids": [5, 6, 7, 8], "note": 1.5},
        {"prompt": "no id"},
        {"custom_id": "batch-1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": chat}},
        {"custom_id": "batch-2", "body": {"model": "any", "prompt": "Count from 2", "max_completion_tokens": 3}},
        {"id": "hot", "prompt": "Once", "sampling": {"temperature": 5.0, "max_tokens": 40, "ignore_eos": True}},
        {"id": "stop", "prompt_token_ids": [5, 6], "sampling": {"stop": ["e", "a", "i", "1", " "], "temperature": 3.0}},
        {"id": "", "messages": chat, "sampling": {"max_tokens": 1}, "note": "é日本🙂"},
        {"id": "parts", "messages": in_parts},
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("mixed")
    rows = write_rows(directory / "rows.jsonl", mixed_rows())
    return generate(directory / "run", f"input={rows}", "writer.keep=[note]", "sampling.max_tokens=24")


def test_answers_come_in_input_order_with_the_ids_as_they_were_given(mixed: Finished):
    assert mixed.code == 0
    rows = mixed.generations
    assert [list(row) for row in rows] == [[*COLUMNS, "note"]] * 10
    assert [row["row"] for row in rows] == list(range(10))
    assert [row["id"] for row in rows] == ["a", "a", 7, 3, "batch-1", "batch-2", "hot", "stop", "", "parts"]
    assert [row["note"] for row in rows] == ["x", None, 1.5, None, None, None, None, None, "é日本🙂", None]
    assert {row["sample"] for row in rows} == {0}
    assert {row["logprobs"] for row in rows} == {None}


def test_every_form_of_a_prompt_becomes_the_tokens_that_it_stands_for(mixed: Finished, tokenizer):
    rows = mixed.generations
    prompts = [row.get("prompt") for row in mixed_rows()]
    assert [rows[i]["num_prompt_tokens"] for i in (0, 3)] == [len(tokenizer(prompts[i])["input_ids"]) for i in (0, 3)]
    assert rows[2]["num_prompt_tokens"] == 4
    chat = tokenizer.apply_chat_template(
        mixed_rows()[1]["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert {rows[i]["num_prompt_tokens"] for i in (1, 4, 8, 9)} == {len(chat)}
    assert rows[1]["text"] == rows[4]["text"] == rows[9]["text"], "so are a Batch line's, and parts are their text"


def test_counts_and_finish_reasons_agree_with_the_tokens(mixed: Finished):
    most = {"batch-2": 3, "hot": 40, "": 1}
    for row in mixed.generations:
        tokens, limit = row["token_ids"], most.get(row["id"], 24)
        assert row["num_output_tokens"] == len(tokens) <= limit
        if row["finish_reason"] == "length":
            assert len(tokens) == limit
        elif row["id"] != "stop":
            assert row["finish_reason"] == "stop"
            assert tokens[-1] in STOP_IDS, "the end of sequence is one of the tokens"
        if row["id"] != "hot":  # it ignores the ends
            assert not STOP_IDS & set(tokens[:-1])
    assert {row["finish_reason"] for row in mixed.generations} == {"stop", "length"}
    assert mixed.generations[6]["finish_reason"] == "length"


def test_text_is_the_decoding_of_all_ids_cut_at_a_stop_string(mixed: Finished, tokenizer):
    for row in mixed.generations:
        decoded = tokenizer.decode(row["token_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if row["id"] == "stop":
            assert row["finish_reason"] == "stop"
            ends = [decoded.index(stop) for stop in ("e", "a", "i", "1", " ") if stop in decoded]
            assert row["text"] == decoded[: min(ends)]
        else:
            assert row["text"] == decoded or row["text"] == decoded.rstrip("\ufffd")


def test_parquet_output_holds_what_jsonl_output_holds(mixed: Finished, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows())
    words = [f"input={rows}", "writer=parquet", "writer.keep=[note]", "sampling.max_tokens=24", "recorder=off"]
    run = generate(tmp_path / "run", *words)
    table = pq.read_table(run.directory / "generations.parquet").to_pylist()
    expected = [row | {"id": str(row["id"]), "note": as_text(row["note"])} for row in mixed.generations]
    assert table == expected, "ids and kept columns of several kinds become texts, all else is the same"
    assert not list(run.directory.glob("*.jsonl.*"))
    assert not (run.directory / "generations.jsonl").exists()


def test_a_kept_column_that_no_first_row_has_is_warned_of_and_null(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Count from 1", "note": 1}])
    run = generate(tmp_path / "run", f"input={rows}", "writer.keep=[note,nota]", "sampling.max_tokens=2")
    assert [(row["note"], row["nota"]) for row in run.generations] == [(1, None)]
    warnings = [line for line in run.log.splitlines() if "[WARNING]" in line]
    assert [("writer.keep=nota" in line, "writer.keep=note" in line) for line in warnings] == [(True, False)]


def as_text(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def test_parquet_input_and_standard_input_give_the_answers_of_a_jsonl_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"id": f"r{i}", "prompt": text} for i, text in enumerate(("Count from 1", "Say", "é日本🙂"))]
    jsonl = write_rows(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = ["sampling.max_tokens=8", "recorder=off"]
    from_jsonl = generate(tmp_path / "jsonl", f"input={jsonl}", *words)
    from_parquet = generate(tmp_path / "parquet", f"input={tmp_path / 'rows.parquet'}", *words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl.read_bytes())))
    from_stdin = generate(tmp_path / "stdin", "input=-", *words)
    assert [run.code for run in (from_jsonl, from_parquet, from_stdin)] == [0, 0, 0]
    assert from_parquet.generations_bytes == from_jsonl.generations_bytes
    assert from_stdin.generations_bytes == from_jsonl.generations_bytes


def test_a_rows_sampling_wins_over_the_jobs_key_by_key_and_the_jobs_over_the_models(tmp_path: Path):
    prompt = [5, 6, 7, 8, 9]
    hot = {"temperature": 4.0, "max_tokens": 12}
    rows = [
        {"prompt_token_ids": prompt},
        {"prompt_token_ids": prompt, "sampling": {"max_tokens": 3}},
        {"prompt_token_ids": prompt, "sampling": {"temperature": 0}},
        {"prompt_token_ids": prompt, "sampling": {"seed": 5}},
        {"prompt_token_ids": prompt, "sampling": {"ignore_eos": None}},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    job = [f"sampling.{key}={value}" for key, value in hot.items()]
    by_job = generate(tmp_path / "job", f"input={path}", "sampling.ignore_eos=true", "recorder=off", *job).generations
    by_model = generate(tmp_path / "model", f"input={path}", "sampling.ignore_eos=true", "sampling.max_tokens=12")
    greedy = by_model.generations[0]["token_ids"]
    assert by_model.generations[3]["token_ids"] == greedy, "the model's own sampling is greedy: a seed changes nothing"
    assert [row["num_output_tokens"] for row in by_job] == [12, 3, 12, 12, 12], "the others keep the job's max_tokens"
    assert by_job[2]["token_ids"] == greedy, "the row's temperature wins, ignore_eos is still the job's"
    assert by_job[0]["token_ids"] != greedy, "the job's temperature wins over the model's"
    assert by_job[3]["token_ids"] != by_job[0]["token_ids"], "the row's seed wins"


# What changes answers and what does not

TIGHT = ("kv.num_blocks=24", "engine.max_num_seqs=6")
HARMLESS = {
    "the same again": (),
    "blocks of one token": ("kv.block_size=1",),
    "large blocks": ("kv.block_size=256",),
    "a small batch": ("engine.max_num_seqs=3",),
    "prompts in pieces": ("engine.max_num_seqs=16", "engine.max_num_batched_tokens=24"),
    "no prefix cache": ("kv=no_prefix_caching",),
    "preemption": TIGHT,
    "preemption, prompts in pieces": (*TIGHT, "engine.max_num_batched_tokens=20"),
}


@pytest.fixture(scope="module")
def sampled_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with long common prefixes, some greedy, some not."""
    rows = bundled_rows(10)
    for i, row in enumerate(rows):
        row["sampling"] = {"temperature": 6.0} if i % 2 else {"temperature": 0}
    return write_rows(tmp_path_factory.mktemp("sampled") / "rows.jsonl", rows)


def sampled_run(directory: Path, path: Path, *words: str) -> Finished:
    return generate(directory, f"input={path}", "sampling.max_tokens=40", "sampling.ignore_eos=true", *words)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, sampled_input: Path) -> Finished:
    return sampled_run(tmp_path_factory.mktemp("baseline") / "run", sampled_input)


@pytest.mark.parametrize("words", HARMLESS.values(), ids=HARMLESS.keys())
def test_settings_that_must_not_change_answers_do_not(
    words: tuple[str, ...], baseline: Finished, sampled_input: Path, tmp_path: Path
):
    run = sampled_run(tmp_path / "run", sampled_input, *words)
    assert run.generations_bytes == baseline.generations_bytes
    num_preempted = sum(len(step["preempted_seq_ids"]) for step in run.table("steps"))
    assert (num_preempted > 0) == ("kv.num_blocks=24" in words), f"{num_preempted} preemptions"
    assert run.manifest["figures"]["num_preemptions"] == num_preempted


def test_another_seed_changes_sampled_rows_and_no_greedy_ones(baseline: Finished, sampled_input: Path, tmp_path: Path):
    run = sampled_run(tmp_path / "run", sampled_input, "seed=1")
    same = [a["token_ids"] == b["token_ids"] for a, b in zip(run.generations, baseline.generations, strict=True)]
    assert same == [True, False] * 5


# Stopping


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[signal.Signals, tuple[Finished, float]]:
    """Three runs, each ended by a signal in the middle, with the seconds that its end took."""
    directory = tmp_path_factory.mktemp("stopped")
    short = {"prompt": "Count", "sampling": {"max_tokens": 2}}
    path = write_rows(directory / "rows.jsonl", [short, *[{"prompt": "Count from 1 to 9"}] * 12, short])
    words = [f"input={path}", "sampling.ignore_eos=true", "kv.num_blocks=2000", "recorder.flush_s=0.2"]
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    runs = {s: start(directory, *words, f"hydra.run.dir={s.name}") for s in signals}
    ended = {}
    try:
        for signum, process in runs.items():
            wait_for_records(directory / signum.name, process)
            process.send_signal(signum)
            began = time.monotonic()
            process.communicate(timeout=30)
            ended[signum] = (Finished(directory / signum.name, process.returncode), time.monotonic() - began)
            assert_sound(directory / signum.name)
    finally:
        for process in runs.values():
            process.kill()
            process.communicate()
    return ended


def wait_for_records(directory: Path, process: subprocess.Popen[str]) -> None:
    """Until a row is answered and a few parts of the records have been written."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        partial = directory / "generations.partial.jsonl"
        parts = list(directory.glob("records/steps/*.parquet"))
        if partial.exists() and partial.stat().st_size and len(parts) >= 3:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run never got to its middle: {process.poll()}")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_soon_with_everything_sealed(
    signum: signal.Signals, code: int, stopped: dict[signal.Signals, tuple[Finished, float]]
):
    run, seconds = stopped[signum]
    assert run.code == code
    assert seconds < 10
    manifest = run.manifest
    assert (manifest["status"], manifest["exit_code"], manifest["error"]) == ("interrupted", code, signum.name)
    assert manifest["attempts"][-1]["ended"] is not None
    assert [path.name for path in run.directory.rglob("*.tmp")] == []
    finished = {row["row"]: row for row in json_lines(run.directory / "generations.partial.jsonl")}
    assert finished.keys() == {0, 13}, "finished rows are there, those that were given up are not"
    assert not (run.directory / "generations.jsonl").exists()
    requests = run.table("requests")
    assert [r["finish_reason"] for r in sorted(requests, key=lambda r: r["row"])] == [
        "length",
        *["aborted"] * 12,
        "length",
    ]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_records_of_a_stopped_run_return_every_block(
    signum: signal.Signals, stopped: dict[signal.Signals, tuple[Finished, float]]
):
    run, _ = stopped[signum]
    ledger = Ledger(2000)
    events = block_events(run.directory)
    for _, event in events:
        ledger.apply(event)
    assert ledger.tables == {}
    assert ledger.free_blocks == 2000
    reasons = {event.reason for _, event in events if event.event in ("free", "release")}
    assert reasons == {"finished", "aborted"}
    steps = run.table("steps")
    assert [step["step"] for step in steps] == list(range(len(steps)))
    sampled = {request["seq_id"]: 0 for request in run.table("requests")}
    for step in steps:
        for seq_id, has_sampled in zip(step["seq_ids"], step["seq_sampled"], strict=True):
            sampled[seq_id] += has_sampled
        for seq_id in step["dropped_seq_ids"]:
            sampled[seq_id] -= 1
    assert sampled == {request["seq_id"]: request["num_output_tokens"] for request in run.table("requests")}


def test_after_sigkill_every_part_opens_and_the_ledger_replays(
    stopped: dict[signal.Signals, tuple[Finished, float]],
):
    run, _ = stopped[signal.SIGKILL]
    assert run.code == -signal.SIGKILL
    assert run.manifest["status"] == "running", "nobody could write down the end"
    steps = read_table(run.directory, "steps")
    assert len(steps) > 0
    assert [step["step"] for step in steps] == list(range(len(steps)))
    free = {step["step"]: step["free_blocks"] for step in steps}
    ledger = Ledger(2000)
    ends = {step: ledger.free_blocks for step in replayed(ledger, block_events(run.directory)) if step in free}
    assert ends
    assert ends == {step: free[step] for step in ends}, "each step on disk has all its block events there"
    read_table(run.directory, "requests")
    assert {row["row"] for row in json_lines(run.directory / "generations.partial.jsonl")} == {0, 13}


# Sweeps


def test_a_sweep_answers_alike_in_each_job_and_one_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # With 100 blocks of one token the first row can never be answered, and one failure is one too many.
    process = start(
        tmp_path,
        "-m",
        "kv.block_size=1,16,64",
        "kv.num_blocks=100",
        "reader.limit=8",
        "reader.max_failures=0",
        "sampling.max_tokens=12",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "sweep: exit codes 1 0 0" in out
    runs = sorted(tmp_path.glob("outputs/multirun/*/*/*"))
    for run in runs:
        assert_sound(run)
    sizes = {json.loads((run / "manifest.json").read_text())["config"]["kv"]["block_size"]: run for run in runs}
    assert sizes.keys() == {1, 16, 64}
    first, *others = [Finished(sizes[size], -1) for size in (1, 16, 64)]
    assert (first.manifest["status"], first.manifest["exit_code"]) == ("failed", 1)
    assert "Traceback" in first.log
    for run in others:
        assert (run.manifest["status"], run.manifest["exit_code"]) == ("complete", 0)
        assert run.generations_bytes == others[0].generations_bytes
        assert len(run.generations) == 8
    names = [run.name for run in runs]
    assert all(set("=,").isdisjoint(name) and len(name) <= 80 for name in names)
    assert {name.split("_")[1] for name in names} == {"size-1", "size-16", "size-64"}


def test_the_preemption_experiment_shows_preemptions(tmp_path: Path):
    run = generate(tmp_path / "run", "experiment=preemption", "reader.limit=60")
    assert run.manifest["figures"]["num_preemptions"] > 0


def test_a_pipe_that_pauses_is_answered_so_far_and_still_stops_at_once(tmp_path: Path):
    words = ["input=-", "hydra.run.dir=run", "progress=off", "sampling.max_tokens=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.generate", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b'{"prompt": "hello"}\n')
    process.stdin.flush()
    partial = tmp_path / "run" / "generations.partial.jsonl"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["row"] for row in map(json.loads, partial.read_text().splitlines())] == [0]
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.stdin.close()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["counts"]["answered"]) == ("interrupted", 1)
    assert_sound(tmp_path / "run")
