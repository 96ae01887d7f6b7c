"""Rows made ready beside the step loop: in their order, failures in place, and without a say in the schedule."""

import random
import time
from pathlib import Path

import pytest

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import PromptError
from nanovllm.prompt_worker import PromptWorker
from tests.jobs.generate_process import bundled_rows, generate, read_table, write_rows

CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_all_forms_come_in_their_order_with_their_failures_in_place(tmp_path: Path):
    kinds = [
        {"prompt": "Hello"},
        {"prompt_token_ids": [5, 6]},
        CHAT,
        {"messages": [{"role": "tool", "content": "the template refuses"}]},
        {"prompt": 5},
        {"prompt_token_ids": [5] * 5000},
    ]
    rows = [kinds[number % len(kinds)] | {"id": number} for number in range(240)]
    random.Random(0).shuffle(rows)
    run = generate(tmp_path / "run", f"input={write_rows(tmp_path / 'rows.jsonl', rows)}", "sampling.max_tokens=1")
    good = [row["id"] for row in rows if row["id"] % len(kinds) < 3]
    assert [row["id"] for row in run.generations] == good
    assert [row["id"] for row in run.failures] == [row["id"] for row in rows if row["id"] not in good]
    arrived = [row["id"] for row in sorted(read_table(run.directory, "requests"), key=lambda row: row["seq_id"])]
    assert arrived == [str(number) for number in good], "the engine got them in input order"


def test_the_schedule_does_not_depend_on_how_fast_prompts_are_made_ready(tmp_path: Path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", bundled_rows(60))
    words = (f"input={path}", "sampling.temperature=0", "sampling.max_tokens=12", "engine.max_num_seqs=8")
    original, rng, waits = PromptWorker.token_ids, random.Random(1), []

    def schedule(name: str) -> list[tuple]:
        run = generate(tmp_path / name, *words, "engine.max_num_batched_tokens=300")
        assert run.code == 0
        return [(s["seq_ids"], s["seq_num_tokens"], s["num_waiting"]) for s in read_table(run.directory, "steps")]

    def slow(self: PromptWorker, prompts):
        waits.append(rng.random() * 0.1)
        time.sleep(waits[-1])
        return original(self, prompts)

    quick = schedule("quick")
    monkeypatch.setattr(PromptWorker, "token_ids", slow)
    assert schedule("slow") == quick
    assert len(waits) > 1
    assert len(quick) > 20


def test_a_run_that_breaks_off_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []
    original = PromptWorker.start

    def start(self: PromptWorker) -> None:
        original(self)
        assert self._process is not None
        started.append(self._process._process.pid)

    def fail(self: LLMEngine):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(PromptWorker, "start", start)
    monkeypatch.setattr(LLMEngine, "step", fail)
    assert generate(tmp_path / "run", "reader.limit=150").code == 1
    assert started
    assert [pid for pid in set(started) if Path(f"/proc/{pid}").exists()] == []


def test_what_makes_rows_ready_and_breaks_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(self: PromptWorker, prompts) -> list[PromptError]:
        raise RuntimeError("the process that tokenises prompts did not start")

    monkeypatch.setattr(PromptWorker, "token_ids", broken)
    run = generate(tmp_path / "run", "reader.limit=3")
    assert (run.code, run.manifest["status"]) == (1, "failed")
    assert "did not start" in run.manifest["error"]
