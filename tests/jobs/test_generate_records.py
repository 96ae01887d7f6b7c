"""The records of a real run, read by pyarrow and DuckDB: schemas, laws between the tables, agreement with the text."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pytest
from transformers import AutoTokenizer

from jobs.analysis.program import main as analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from nanovllm.models.source import resolve_model
from tests.engine.ledger import Ledger, tables_at_steps
from tests.jobs.generate_process import (
    TABLES,
    Finished,
    Row,
    block_events,
    bundled_rows,
    generate,
    replayed,
    write_rows,
)

NUM_BLOCKS = 26
BLOCK_SIZE = 16

SPEC = {
    "steps": """
        replica int32, attempt int32, step int64, phase string, start_ns int64, end_ns int64, schedule_ms float64,
        prepare_ms float64, postprocess_ms float64, forward_ms float64, batch_size int32, padded_batch_size int32,
        padded_num_tokens int32,
        num_prefill_tokens int32, num_decode_tokens int32, num_cached_tokens int32, num_waiting int32,
        num_running int32, num_preempted int32, num_finished int32, free_blocks int32, used_blocks int32,
        cached_blocks int32, cuda_graph bool, in_halves bool, device_allocated_bytes int64, device_reserved_bytes int64,
        seq_ids list<int64>, seq_num_tokens list<int32>, seq_context_lens list<int32>, seq_cached_tokens list<int32>,
        seq_sampled list<bool>, preempted_seq_ids list<int64>, finished_seq_ids list<int64>,
        dropped_seq_ids list<int64>, comm_calls int32, comm_bytes int64
    """,
    "block_events": """
        replica int32, attempt int32, step int64, event string, block_id int32, seq_id int64, reason string,
        ref_count int32, block_hash uint64, free_blocks int32
    """,
    "requests": """
        replica int32, attempt int32, seq_id int64, row int64, sample int32, id string, num_prompt_tokens int32,
        num_cached_tokens int32, num_output_tokens int32, arrived_ns int64, first_scheduled_ns int64,
        first_token_ns int64, finished_ns int64, num_preemptions int32, finish_reason string,
        shared_prefix_row int64, shared_prefix_tokens int32
    """,
}
"""The tables as spec/flight-recorder.md has them."""

DUCKDB_TYPES = {
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint64": "UBIGINT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
}
MAY_BE_NULL = {"reason", "block_hash", "shared_prefix_row"}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with a common system message, two of them equal, one of them alone in what it says."""
    rows = bundled_rows(9)
    lone = {"id": "lone", "prompt_token_ids": [9, 8, 7]}
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [*rows, {**rows[3], "id": "again"}, lone])


WORDS = (
    f"kv.num_blocks={NUM_BLOCKS}",
    "engine.max_num_seqs=5",
    "engine.max_num_batched_tokens=70",
    "sampling.max_tokens=50",
    "sampling.ignore_eos=true",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> Finished:
    """A run with prompts in pieces, prefix hits, evictions and preemptions, in several parts."""
    directory = tmp_path_factory.mktemp("records") / "run"
    finished = generate(directory, f"input={rows_file}", *WORDS, "recorder.flush_s=0.1")
    assert finished.code == 0
    return finished


@pytest.fixture(scope="module")
def steps(run: Finished) -> list[Row]:
    return run.table("steps")


@pytest.fixture(scope="module")
def requests(run: Finished) -> dict[int, Row]:
    return {request["seq_id"]: request for request in run.table("requests")}


def test_the_run_has_everything_that_these_tests_are_about(run: Finished, steps: list[Row]):
    kinds = Counter(event.event for _, event in block_events(run.directory))
    assert kinds.keys() == {"allocate", "hit", "commit", "free", "release", "evict"}, kinds
    assert {step["phase"] for step in steps} == {"prefill", "decode", "mixed"}
    assert sum(step["num_preempted"] for step in steps) > 0
    assert len(list(run.directory.glob("records/steps/*.parquet"))) > 2


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_the_columns_and_types_of_the_contract_and_no_needless_null(table: str, run: Finished):
    expected = [tuple(column.split()) for column in SPEC[table].replace("\n", " ").split(",")]
    glob = f"{run.directory}/records/{table}/*.parquet"
    with duckdb.connect() as connection:
        found = connection.execute(f"DESCRIBE SELECT * FROM '{glob}'").fetchall()
        assert [(name, kind) for name, kind, *_ in found] == [(name, duckdb_type(kind)) for name, kind in expected]
        counts = ", ".join(f"count(*) - count({name})" for name, _ in expected)
        nulls = connection.execute(f"SELECT {counts} FROM '{glob}'").fetchone()
        versions = connection.execute(
            f"SELECT DISTINCT decode(value) FROM parquet_kv_metadata('{glob}') WHERE decode(key) = 'schema_version'"
        ).fetchall()
    assert versions == [("3",)]
    assert nulls is not None
    assert {name for (name, _), count in zip(expected, nulls, strict=True) if count} <= MAY_BE_NULL


def duckdb_type(kind: str) -> str:
    if kind.startswith("list<"):
        return f"{DUCKDB_TYPES[kind[5:-1]]}[]"
    return DUCKDB_TYPES[kind]


def test_duckdb_and_pyarrow_read_the_same(run: Finished, steps: list[Row]):
    query = f"SELECT count(*), sum(batch_size), sum(len(seq_ids)) FROM '{run.directory}/records/steps/*.parquet'"
    with duckdb.connect() as connection:
        counted = connection.execute(query).fetchone()
    assert counted == (len(steps), sum(step["batch_size"] for step in steps), sum(len(s["seq_ids"]) for s in steps))


def test_part_names_sort_in_the_order_of_writing(run: Finished):
    for table in TABLES:
        parts = sorted(run.directory.glob(f"records/{table}/*.parquet"))
        times = [part.stat().st_mtime_ns for part in parts]
        assert times == sorted(times)
        assert not [path for path in run.directory.glob(f"records/{table}/*") if path not in parts]


# Steps


def test_steps_have_no_gap_and_their_numbers_agree(steps: list[Row]):
    assert [step["step"] for step in steps] == list(range(len(steps)))
    for step in steps:
        who = f"step {step['step']}"
        tokens, decodes = step["seq_num_tokens"], step["num_decode_tokens"]
        lists = ("seq_num_tokens", "seq_context_lens", "seq_cached_tokens", "seq_sampled")
        assert {len(step[name]) for name in lists} == {step["batch_size"]} == {len(step["seq_ids"])}, who
        assert len(set(step["seq_ids"])) == step["batch_size"] == step["padded_batch_size"], who
        assert sum(tokens) == step["num_prefill_tokens"] + decodes == step["padded_num_tokens"] <= 70, who
        assert tokens[:decodes] == [1] * decodes, f"{who}: rows that decode come first"
        phase = ("prefill", "mixed")[decodes > 0] if step["num_prefill_tokens"] else "decode"
        assert step["phase"] == phase, who
        assert sum(step["seq_cached_tokens"]) == step["num_cached_tokens"], who
        assert len(step["preempted_seq_ids"]) == step["num_preempted"], who
        assert len(step["finished_seq_ids"]) == step["num_finished"], who
        assert step["free_blocks"] + step["used_blocks"] == NUM_BLOCKS, who
        assert 0 <= step["cached_blocks"] <= step["free_blocks"], who
        assert step["num_running"] <= 5, who
        assert (step["cuda_graph"], step["in_halves"]) == (False, False), who
        assert (step["comm_calls"], step["comm_bytes"]) == (0, 0), who


def test_step_times_are_of_the_runs_clock_and_durations_fit_into_them(run: Finished, steps: list[Row]):
    phases = {phase["name"]: phase for phase in run.manifest["attempts"][0]["phases"]}
    before = phases["generate"]["start_ns"]
    for step in steps:
        assert before <= step["start_ns"] < step["end_ns"], f"step {step['step']}"
        before = step["end_ns"]
        host_ms = step["schedule_ms"] + step["prepare_ms"]
        assert min(step["schedule_ms"], step["prepare_ms"], step["forward_ms"], step["postprocess_ms"]) > 0
        assert host_ms + step["forward_ms"] <= (step["end_ns"] - step["start_ns"]) / 1e6, f"step {step['step']}"
    assert before <= phases["generate"]["end_ns"]


def test_each_sequence_advances_by_its_tokens_and_those_from_the_cache(steps: list[Row]):
    context: dict[int, int] = defaultdict(int)
    for step in steps:
        for seq_id in step["preempted_seq_ids"]:
            context[seq_id] = 0
        names = ("seq_ids", "seq_num_tokens", "seq_context_lens", "seq_cached_tokens")
        for seq_id, num_tokens, after, cached in zip(*(step[name] for name in names), strict=True):
            assert cached == 0 or context[seq_id] == 0, "only a sequence that begins takes tokens from the cache"
            context[seq_id] += cached + num_tokens
            assert context[seq_id] == after, f"step {step['step']}, seq_id={seq_id}"


# The ledger


def test_the_ledger_replays_from_the_parquet_files_alone(run: Finished, steps: list[Row]):
    ledger = Ledger(NUM_BLOCKS)
    events = block_events(run.directory)
    at = dict.fromkeys(replayed(ledger, events))
    assert list(at) == sorted(at), "one engine without look-ahead: events come step by step"
    assert ledger.tables == {}, "at the end every block has been given back"
    ledger, left = Ledger(NUM_BLOCKS), iter(events)
    pending = next(left, None)
    for step in steps:
        while pending is not None and pending[0] == step["step"]:
            ledger.apply(pending[1])
            pending = next(left, None)
        counted = (step["free_blocks"], step["used_blocks"], step["cached_blocks"])
        replay = (ledger.free_blocks, NUM_BLOCKS - ledger.free_blocks, ledger.cached_blocks)
        assert counted == replay, f"step {step['step']}"
        users = Counter(block for table in ledger.tables.values() for block in table)
        assert users == Counter(ledger.ref_counts), f"step {step['step']}: reference counts are the live tables'"


def test_each_steps_block_tables_cover_their_contexts(run: Finished, steps: list[Row]):
    seq_ids = {step["step"]: step["seq_ids"] for step in steps}
    tables = tables_at_steps(seq_ids, block_events(run.directory))
    for step in steps:
        used = tables[step["step"]]
        for seq_id, context, sampled in zip(
            step["seq_ids"], step["seq_context_lens"], step["seq_sampled"], strict=True
        ):
            who, needed = f"step {step['step']}, seq_id={seq_id}", -(-context // BLOCK_SIZE)
            assert len(used[seq_id]) >= needed, who
            if sampled:  # in the middle of a prompt, the blocks of the rest are there already
                assert len(used[seq_id]) == needed, who


def test_cached_tokens_are_the_blocks_that_were_hit(run: Finished, steps: list[Row]):
    hits = Counter((step, event.seq_id) for step, event in block_events(run.directory) if event.event == "hit")
    cached = {
        (step["step"], seq_id): tokens
        for step in steps
        for seq_id, tokens in zip(step["seq_ids"], step["seq_cached_tokens"], strict=True)
        if tokens
    }
    assert cached == {key: count * BLOCK_SIZE for key, count in hits.items()}


# Requests


def test_tokens_in_steps_requests_and_generations_are_the_same(
    run: Finished, steps: list[Row], requests: dict[int, Row]
):
    sampled = Counter(
        seq_id
        for step in steps
        for seq_id, has_sampled in zip(step["seq_ids"], step["seq_sampled"], strict=True)
        if has_sampled
    )
    sampled.subtract(seq_id for step in steps for seq_id in step["dropped_seq_ids"])
    by_row = {row["row"]: row for row in run.generations}
    assert {request["row"] for request in requests.values()} == by_row.keys()
    for seq_id, request in requests.items():
        row = by_row[request["row"]]
        assert sampled[seq_id] == request["num_output_tokens"] == len(row["token_ids"]), f"seq_id={seq_id}"
        assert request["num_prompt_tokens"] == row["num_prompt_tokens"]
        assert request["finish_reason"] == row["finish_reason"]
        assert request["id"] == str(row["id"])
        assert request["sample"] == 0
    finished = [seq_id for step in steps for seq_id in step["finished_seq_ids"]]
    assert sorted(finished) == sorted(requests), "each sequence finishes in one step"


def test_a_requests_cached_tokens_are_those_of_its_first_step(
    run: Finished, steps: list[Row], requests: dict[int, Row]
):
    first: dict[int, int] = {}
    preemptions: Counter[int] = Counter()
    for step in steps:
        preemptions.update(step["preempted_seq_ids"])
        for seq_id, cached in zip(step["seq_ids"], step["seq_cached_tokens"], strict=True):
            first.setdefault(seq_id, cached)
    assert first == {seq_id: request["num_cached_tokens"] for seq_id, request in requests.items()}
    assert preemptions == Counter({s: r["num_preemptions"] for s, r in requests.items() if r["num_preemptions"]})
    figures = run.manifest["figures"]
    prompt_tokens = sum(request["num_prompt_tokens"] for request in requests.values())
    assert figures["num_cached_prompt_tokens"] == sum(first.values())
    assert figures["prefix_cache_hit_rate"] == pytest.approx(sum(first.values()) / prompt_tokens)


def test_the_times_of_a_request_are_in_order_and_those_of_its_steps(steps: list[Row], requests: dict[int, Row]):
    starts: dict[int, int] = {}
    first_tokens: dict[int, int] = {}
    ends: dict[int, int] = {}
    for step in steps:
        for seq_id, has_sampled in zip(step["seq_ids"], step["seq_sampled"], strict=True):
            starts.setdefault(seq_id, step["start_ns"])
            if has_sampled:
                first_tokens.setdefault(seq_id, step["end_ns"])
        ends |= dict.fromkeys(step["finished_seq_ids"], step["end_ns"])
    for seq_id, request in requests.items():
        names = ("arrived_ns", "first_scheduled_ns", "first_token_ns", "finished_ns")
        times = [request[name] for name in names]
        assert times == sorted(times), f"seq_id={seq_id}: {times}"
        assert request["first_scheduled_ns"] == starts[seq_id]
        assert request["first_token_ns"] == first_tokens[seq_id]
        assert request["finished_ns"] >= ends[seq_id]


def test_the_shared_prefix_is_the_longest_with_any_earlier_row(rows_file: Path, run: Finished):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny").directory)
    prompts: list[list[int]] = [
        tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in bundled_rows(9)
    ]
    prompts += [prompts[3], [9, 8, 7]]
    requests = {request["row"]: request for request in run.table("requests")}
    for row, prompt in enumerate(prompts):
        lengths = [num_common(prompt, earlier) for earlier in prompts[:row]]
        found = (requests[row]["shared_prefix_row"], requests[row]["shared_prefix_tokens"])
        best = max(lengths, default=0)
        assert found[1] == best, f"row {row}"
        assert found[0] is None if best == 0 else lengths[found[0]] == best, f"row {row}"
    assert (requests[9]["shared_prefix_row"], requests[9]["shared_prefix_tokens"]) == (3, len(prompts[3]))
    assert requests[10]["shared_prefix_row"] is None


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# What jobs.analyze and jobs.explain make of them


def test_the_analysis_has_the_figures_of_the_manifest(run: Finished):
    """Counted while the engine ran, and again from the records."""
    figures, counted = RunFigures.of(RecordedRun(run.directory)), run.manifest["figures"]
    assert figures.num_steps == counted["num_steps"]
    assert figures.num_sampled_tokens == counted["num_output_tokens"]
    assert figures.num_prompt_tokens == counted["num_prompt_tokens"]
    assert figures.num_cached_prompt_tokens == counted["num_cached_prompt_tokens"]
    assert figures.num_preemptions == counted["num_preemptions"] > 0
    assert figures.num_recomputed_tokens > 0
    assert min(figures.ledger[place] for place in ("load", "prefill", "decode", "recompute", "host gaps")) > 0
    phases = run.manifest["attempts"][0]["phases"]
    assert figures.ledger["load"] == sum(p["end_ns"] - p["start_ns"] for p in phases if p["name"] == "load")
    assert sum(figures.ledger.values()) == pytest.approx(phases[-1]["end_ns"])


def test_every_row_can_be_explained(run: Finished, requests: dict[int, Row], capsys: pytest.CaptureFixture[str]):
    for request in requests.values():
        assert analysis("explain", [f"run={run.directory}", f"row={request['row']}"]) == 0
        said = capsys.readouterr().out
        assert f"row {request['row']} ({request['id']})" in said
        assert said.count(": preempted,") == request["num_preemptions"]


# Off, and beside the text log


def test_without_the_recorder_the_answers_are_the_same_and_there_are_no_records(
    run: Finished, rows_file: Path, tmp_path: Path
):
    off = generate(tmp_path / "off", f"input={rows_file}", *WORDS, "recorder=off")
    assert off.generations_bytes == run.generations_bytes
    assert not (off.directory / "records").exists()
    assert off.manifest["figures"]["num_steps"] == run.manifest["figures"]["num_steps"]


def test_the_text_log_has_the_numbers_of_the_records(run: Finished, steps: list[Row], requests: dict[int, Row]):
    log = run.log
    (totals,) = re.findall(r"Generation complete: (\d+) steps, total_output_tokens=(\d+),", log)
    assert totals == (str(len(steps)), str(sum(request["num_output_tokens"] for request in requests.values())))
    assert f"Total prompts: {len(requests)}\n" in log
    assert f"Total prompt tokens: {sum(r['num_prompt_tokens'] for r in requests.values())}\n" in log
    assert re.findall(r"Scheduled PREFILL batch: (.*)", log) == [
        prefill_line(step) for step in steps if step["num_prefill_tokens"]
    ]
    decodes = [step for step in steps if step["num_decode_tokens"]]
    shown = {int(number): rest for number, rest in re.findall(r"Scheduled DECODE batch \(step (\d+)\): (.*)", log)}
    assert shown == {number: decode_line(decodes[number - 1]) for number in shown}
    assert shown.keys() == news(decodes), "the lines at INFO: the first, every tenth, another size, a preemption"
    preempted = [int(seq_id) for seq_id in re.findall(r"Preempted seq_id=(\d+):", log)]
    assert preempted == [seq_id for step in steps for seq_id in step["preempted_seq_ids"]]


def prefill_line(step: Row) -> str:
    first = step["num_decode_tokens"]
    names = ("seq_ids", "seq_context_lens", "seq_cached_tokens")
    columns = zip(*(step[name][first:] for name in names), strict=True)
    listed = ", ".join(f"seq_{seq_id}(len={context},cached={cached})" for seq_id, context, cached in columns)
    return f"size={step['batch_size'] - first}, batched_tokens={step['num_prefill_tokens']}, seqs=[{listed}]"


def decode_line(step: Row) -> str:
    count = step["num_decode_tokens"]
    columns = zip(step["seq_ids"][:count], step["seq_context_lens"][:count], strict=True)
    listed = ", ".join(f"seq_{seq_id}(len={context})" for seq_id, context in columns)
    return f"size={count}, preempted={step['num_preempted']}, seqs=[{listed}]"


def news(decodes: list[Row]) -> set[int]:
    sizes = [0, *(step["num_decode_tokens"] for step in decodes)]
    return {
        number
        for number, step in enumerate(decodes, start=1)
        if number % 10 == 0 or sizes[number] != sizes[number - 1] or step["num_preempted"]
    }


# DEBUG: every line of spec/logging.md

ENGINE, SCHEDULER = "nanovllm.engine.llm_engine", "nanovllm.engine.scheduler"
BLOCKS, RUNNER = "nanovllm.engine.block_manager", "nanovllm.engine.model_runner"
ATTENTION = "nanovllm.layers.attention"
SEQS = r"\[seq_\d+\(len=\d+\)(, seq_\d+\(len=\d+\))*\]"
PREFILL_SEQS = r"\[seq_\d+\(len=\d+,cached=\d+\)(, seq_\d+\(len=\d+,cached=\d+\))*\]"
MEMORY = r"(CPU Memory: RSS=\d+\.\d\dGB|GPU Memory \[Device \d\]: Allocated=\d+\.\d\dGB, Reserved=\d+\.\d\dGB)"
KEY_VALUES = r"\w+=.+(, \w+=.+)+"
LINES = (
    (ENGINE, "INFO", "={80}"),
    (ENGINE, "INFO", "Initializing LLMEngine"),
    (ENGINE, "INFO", "Model: tiny"),
    (ENGINE, "INFO", f"Configuration: {KEY_VALUES}"),
    (RUNNER, "INFO", r"Initializing ModelRunner \(rank 0\)"),
    (RUNNER, "INFO", "Loading model: tiny"),
    (RUNNER, "INFO", f"Model config: num_layers=5, hidden_size=256, {KEY_VALUES}"),
    (RUNNER, "INFO", f"After model loading - {MEMORY}"),
    (RUNNER, "INFO", "Allocating KV cache"),
    (RUNNER, "INFO", "KV cache configuration: num_kv_heads=2, head_dim=64, block_size=16"),
    (RUNNER, "INFO", r"Allocating 26 KV cache blocks, total_size=\d+\.\d\dGB"),
    (RUNNER, "INFO", r"KV cache capacity: \d+ tokens"),
    (RUNNER, "INFO", f"After KV cache allocation - {MEMORY}"),
    (ENGINE, "INFO", "-{80}"),
    (ENGINE, "INFO", r"Starting generation for prompts streamed from .+rows\.jsonl"),
    (SCHEDULER, "INFO", rf"Scheduled PREFILL batch: size=\d+, batched_tokens=\d+, seqs={PREFILL_SEQS}"),
    (RUNNER, "DEBUG", r"\[Rank 0\] Preparing PREFILL batch: \d+ sequences"),
    (RUNNER, "DEBUG", r"\[Rank 0\] PREFILL tensors: input_ids=\[(\d+)\], positions=\[\1\], slot_mapping=\[\1\]"),
    (RUNNER, "DEBUG", r"\[Rank 0\] PREFILL: max_seqlen_q=\d+, max_seqlen_k=\d+, total_tokens=\d+"),
    (RUNNER, "DEBUG", r"\[START\] \[Rank 0\] Model forward PREFILL"),
    (RUNNER, "DEBUG", r"\[END\] \[Rank 0\] Model forward PREFILL - Elapsed: \d+\.\d\dms"),
    (RUNNER, "DEBUG", r"\[START\] \[Rank 0\] Model forward MIXED"),
    (RUNNER, "DEBUG", r"\[END\] \[Rank 0\] Model forward MIXED - Elapsed: \d+\.\d\dms"),
    (RUNNER, "DEBUG", r"\[Rank 0\] Output: logits=\[\d+, 1600\]"),
    (SCHEDULER, "INFO", rf"Scheduled DECODE batch \(step \d+\): size=\d+, preempted=\d+, seqs={SEQS}"),
    (SCHEDULER, "DEBUG", rf"Scheduled DECODE batch \(step \d+\): size=\d+, preempted=0, seqs={SEQS}"),
    (RUNNER, "DEBUG", r"\[Rank 0\] Preparing DECODE batch: \d+ sequences"),
    (
        RUNNER,
        "DEBUG",
        r"\[Rank 0\] DECODE tensors: input_ids=\[(\d+)\], positions=\[\1\], context_lens=\[\1\], "
        r"block_tables=\[\1, \d+\]",
    ),
    (RUNNER, "DEBUG", r"\[START\] \[Rank 0\] Model forward DECODE"),
    (RUNNER, "DEBUG", r"\[END\] \[Rank 0\] Model forward DECODE - Elapsed: \d+\.\d\dms"),
    (BLOCKS, "DEBUG", r"Allocating blocks for seq_id=\d+, num_blocks=\d+"),
    (
        BLOCKS,
        "DEBUG",
        r"Allocated blocks for seq_id=\d+: new=\d+, cache_hits=\d+, free_blocks=\d+, used_blocks=\d+",
    ),
    (BLOCKS, "DEBUG", r"Deallocated blocks for seq_id=\d+: freed=\d+/\d+, free_blocks=\d+"),
    (ATTENTION, "DEBUG", r"Attention forward: is_prefill=(True|False), q=\[(\d+), 4, 64\](, [kv]=\[\2, 2, 64\]){2}"),
    (ATTENTION, "DEBUG", r"Storing KV cache: N=(\d+), num_heads=2, head_dim=64, num_slots=\1"),
    (ATTENTION, "DEBUG", r"Decode attention: k_cache=(\[26, 2, 16, 64\]), v_cache=\1"),
    (ATTENTION, "DEBUG", r"Attention output: \[\d+, 4, 64\]"),
    (SCHEDULER, "DEBUG", r"Sequence finished: seq_id=\d+, output_len=\d+, reason=max_tokens"),
    (SCHEDULER, "DEBUG", r"Postprocess: \d+/\d+ sequences finished"),
    (SCHEDULER, "WARNING", r"Preempted seq_id=\d+: freed=\d+, free_blocks=\d+, num_preemptions=1 - .*kv\.num_blocks.*"),
    (SCHEDULER, "INFO", r"Preempted seq_id=\d+: freed=\d+, free_blocks=\d+, num_preemptions=\d+"),
    (
        ENGINE,
        "INFO",
        r"Generation complete: \d+ steps, total_output_tokens=550, prefill_time=\d+\.\d\ds, decode_time=\d+\.\d\ds",
    ),
    (ENGINE, "INFO", "Total prompts: 11"),
    (ENGINE, "INFO", r"Total prompt tokens: \d+"),
    (ENGINE, "INFO", f"After generation - {MEMORY}"),
)


def test_a_job_at_debug_writes_every_line_of_the_contract_and_no_other(rows_file: Path, tmp_path: Path):
    run = generate(tmp_path / "run", f"input={rows_file}", *WORDS, "log_level=DEBUG")
    patterns = [
        re.compile(rf"\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\] \[{re.escape(logger)}\] \[{level}\] {text}")
        for logger, level, text in LINES
    ]
    unseen = set(patterns)
    for line in run.log.splitlines():
        found = {pattern for pattern in patterns if pattern.fullmatch(line)}
        assert found, f"no line of the contract: {line}"
        unseen -= found
    assert not unseen, f"not written: {[pattern.pattern for pattern in unseen]}"


def test_at_warning_only_the_advice_on_preemption_is_written(rows_file: Path, tmp_path: Path):
    run = generate(tmp_path / "run", f"input={rows_file}", *WORDS, "log_level=WARNING")
    (line,) = run.log.splitlines()
    assert "[WARNING] Preempted seq_id=" in line
