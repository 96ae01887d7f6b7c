"""The text log against its contract: each line's pattern, level and logger, and which lines come when."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from nanovllm.engine.plan import StepResult
from nanovllm.events import (
    ABORTED,
    ALLOCATE,
    COMMIT,
    EVICT,
    FINISHED,
    FREE,
    HIT,
    PREEMPTED,
    RELEASE,
    ArrivalEvent,
    BlockEvent,
    BlockEvents,
    FinishedSequence,
    Preemption,
    RequestEvent,
)
from nanovllm.logging import lines
from nanovllm.logging.text_recorder import ModelFacts, TextRecorder
from tests.logging.synthetic_events import make_plan, make_schedule, make_step

ENGINE = "nanovllm.engine.llm_engine"
SCHEDULER = "nanovllm.engine.scheduler"
BLOCKS = "nanovllm.engine.block_manager"
RUNNER = "nanovllm.engine.model_runner"
ATTENTION = "nanovllm.layers.attention"

FACTS = ModelFacts(
    num_attention_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    kv_cache_shape=(512, 16, 8, 128),
    block_size=16,
)
MEMORY = "GPU Memory [Device 0]: Allocated=1.25GB, Reserved=1.50GB"


class Line(NamedTuple):
    logger: str
    level: str
    text: str


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture):
    """All lines so far, and none of them twice: call it to read and clear."""
    caplog.set_level(logging.DEBUG, logger="nanovllm")

    def read() -> list[Line]:
        found = [Line(record.name, record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return read


@pytest.fixture
def recorder() -> TextRecorder:
    return TextRecorder(FACTS, lambda: MEMORY)


def taken(seq_id: int, hits: int, count: int, free_after: int) -> tuple[BlockEvent, ...]:
    events = [HIT] * hits + [ALLOCATE] * count
    first_free = free_after + len(events) - 1
    return tuple(
        BlockEvent(event, i, seq_id, None, 1, 77 if event == HIT else None, first_free - i)
        for i, event in enumerate(events)
    )


def test_each_initialisation_line_has_the_pattern_level_and_logger_of_the_contract(log):
    settings = {"tensor_parallel_size": 1, "max_model_len": 2048}
    lines.log_engine_start("~/huggingface/Qwen3-0.6B/", settings)
    lines.log_runner_start(0)
    lines.log_model_loading("~/huggingface/Qwen3-0.6B/")
    lines.log_model_config({"num_layers": 28, "hidden_size": 1024})
    lines.log_model_loaded(lambda: MEMORY)
    lines.log_kv_cache(num_kv_heads=8, head_dim=128, block_size=16, num_blocks=512, total_bytes=940_000_000)
    lines.log_kv_cache_allocated(lambda: "CPU Memory: RSS=0.52GB")
    assert log() == [
        (ENGINE, "INFO", "=" * 80),
        (ENGINE, "INFO", "Initializing LLMEngine"),
        (ENGINE, "INFO", "Model: ~/huggingface/Qwen3-0.6B/"),
        (ENGINE, "INFO", "Configuration: tensor_parallel_size=1, max_model_len=2048"),
        (RUNNER, "INFO", "Initializing ModelRunner (rank 0)"),
        (RUNNER, "INFO", "Loading model: ~/huggingface/Qwen3-0.6B/"),
        (RUNNER, "INFO", "Model config: num_layers=28, hidden_size=1024"),
        (RUNNER, "INFO", f"After model loading - {MEMORY}"),
        (RUNNER, "INFO", "Allocating KV cache"),
        (RUNNER, "INFO", "KV cache configuration: num_kv_heads=8, head_dim=128, block_size=16"),
        (RUNNER, "INFO", "Allocating 512 KV cache blocks, total_size=0.94GB"),
        (RUNNER, "INFO", "KV cache capacity: 8192 tokens"),
        (RUNNER, "INFO", "After KV cache allocation - CPU Memory: RSS=0.52GB"),
    ]


def test_generation_over_known_prompts_starts_with_their_numbers(log, recorder):
    recorder.on_start(2, 156, None)
    assert log() == [
        (ENGINE, "INFO", "-" * 80),
        (ENGINE, "INFO", "Starting generation for 2 prompts"),
        (ENGINE, "INFO", "Total prompt tokens: 156"),
    ]


def test_a_streaming_generation_names_its_source_first_and_its_numbers_last(log, recorder):
    recorder.on_start(None, None, "prompts.jsonl")
    assert [line.text for line in log()] == ["-" * 80, "Starting generation for prompts streamed from prompts.jsonl"]
    for seq_id, (row, sample) in enumerate([(0, 0), (0, 1), (1, 0)]):
        ids = np.zeros(10 + row, np.int32)
        recorder.on_arrival(ArrivalEvent(seq_id=seq_id, row=row, sample=sample, time_ns=0, prompt_token_ids=ids))
    recorder.on_end()
    assert log() == [
        (ENGINE, "INFO", "Generation complete: 0 steps, total_output_tokens=0, prefill_time=0.00s, decode_time=0.00s"),
        (ENGINE, "INFO", "Total prompts: 2"),
        (ENGINE, "INFO", "Total prompt tokens: 21"),
        (ENGINE, "INFO", f"After generation - {MEMORY}"),
        (ENGINE, "INFO", "-" * 80),
    ]


def test_a_prefill_step_has_the_lines_of_the_contract_in_their_order(log, recorder):
    plan = make_plan(prefills=[(0, 0, 78), (1, 32, 46)])
    schedule = make_schedule(plan, cached=[0, 32], block_events=taken(0, 0, 5, 507) + taken(1, 2, 3, 502))
    recorder.on_schedule(schedule)
    assert log() == [
        (BLOCKS, "DEBUG", "Allocating blocks for seq_id=0, num_blocks=5"),
        (BLOCKS, "DEBUG", "Allocated blocks for seq_id=0: new=5, cache_hits=0, free_blocks=507, used_blocks=5"),
        (BLOCKS, "DEBUG", "Allocating blocks for seq_id=1, num_blocks=5"),
        (BLOCKS, "DEBUG", "Allocated blocks for seq_id=1: new=3, cache_hits=2, free_blocks=502, used_blocks=10"),
        (
            SCHEDULER,
            "INFO",
            "Scheduled PREFILL batch: size=2, batched_tokens=124, "
            "seqs=[seq_0(len=78,cached=0), seq_1(len=78,cached=32)]",
        ),
        (RUNNER, "DEBUG", "[Rank 0] Preparing PREFILL batch: 2 sequences"),
        (RUNNER, "DEBUG", "[Rank 0] PREFILL tensors: input_ids=[124], positions=[124], slot_mapping=[124]"),
        (RUNNER, "DEBUG", "[Rank 0] PREFILL: max_seqlen_q=78, max_seqlen_k=78, total_tokens=124"),
        (RUNNER, "DEBUG", "[START] [Rank 0] Model forward PREFILL"),
    ]
    recorder.on_step(
        make_step(schedule, result=StepResult(token_ids=np.zeros(2, np.int32), forward_ms=12.345, logits_rows=2))
    )
    assert log() == [
        (
            ATTENTION,
            "DEBUG",
            "Attention forward: is_prefill=True, q=[124, 16, 128], k=[124, 8, 128], v=[124, 8, 128]",
        ),
        (ATTENTION, "DEBUG", "Storing KV cache: N=124, num_heads=8, head_dim=128, num_slots=124"),
        (ATTENTION, "DEBUG", "Attention output: [124, 16, 128]"),
        (RUNNER, "DEBUG", "[END] [Rank 0] Model forward PREFILL - Elapsed: 12.35ms"),
        (RUNNER, "DEBUG", "[Rank 0] Output: logits=[2, 151936]"),
    ]


def test_a_decode_step_has_the_lines_of_the_contract_in_their_order(log, recorder):
    schedule = make_schedule(make_plan(decodes=[(0, 79), (1, 81)]))
    recorder.on_schedule(schedule)
    assert log() == [
        (
            SCHEDULER,
            "INFO",
            "Scheduled DECODE batch (step 1): size=2, preempted=0, seqs=[seq_0(len=79), seq_1(len=81)]",
        ),
        (RUNNER, "DEBUG", "[Rank 0] Preparing DECODE batch: 2 sequences"),
        (
            RUNNER,
            "DEBUG",
            "[Rank 0] DECODE tensors: input_ids=[2], positions=[2], context_lens=[2], block_tables=[2, 6]",
        ),
        (RUNNER, "DEBUG", "[START] [Rank 0] Model forward DECODE"),
    ]
    recorder.on_step(make_step(schedule))
    assert log() == [
        (ATTENTION, "DEBUG", "Attention forward: is_prefill=False, q=[2, 16, 128], k=[2, 8, 128], v=[2, 8, 128]"),
        (ATTENTION, "DEBUG", "Storing KV cache: N=2, num_heads=8, head_dim=128, num_slots=2"),
        (ATTENTION, "DEBUG", "Decode attention: k_cache=[512, 16, 8, 128], v_cache=[512, 16, 8, 128]"),
        (ATTENTION, "DEBUG", "Attention output: [2, 16, 128]"),
        (RUNNER, "DEBUG", "[END] [Rank 0] Model forward DECODE - Elapsed: 0.00ms"),
        (RUNNER, "DEBUG", "[Rank 0] Output: logits=[2, 151936]"),
    ]


def test_a_mixed_step_logs_both_scheduled_lines_with_their_own_sizes_and_one_mixed_forward(log, recorder):
    schedule = make_schedule(make_plan(decodes=[(0, 79)], prefills=[(5, 0, 30), (6, 16, 10)]), cached=[0, 0, 16])
    recorder.on_schedule(schedule)
    recorder.on_step(make_step(schedule))
    texts = [line.text for line in log()]
    assert texts[:2] == [
        "Scheduled PREFILL batch: size=2, batched_tokens=40, seqs=[seq_5(len=30,cached=0), seq_6(len=26,cached=16)]",
        "Scheduled DECODE batch (step 1): size=1, preempted=0, seqs=[seq_0(len=79)]",
    ]
    assert "[Rank 0] PREFILL tensors: input_ids=[40], positions=[40], slot_mapping=[40]" in texts
    assert "[Rank 0] DECODE tensors: input_ids=[1], positions=[1], context_lens=[1], block_tables=[1, 5]" in texts
    assert "Attention forward: is_prefill=True, q=[41, 16, 128], k=[41, 8, 128], v=[41, 8, 128]" in texts
    assert [text for text in texts if "Model forward" in text] == [
        "[START] [Rank 0] Model forward MIXED",
        "[END] [Rank 0] Model forward MIXED - Elapsed: 0.00ms",
    ]


def test_a_cuda_graph_step_shows_padded_tensors_and_the_tokens_really_stored(log, recorder):
    result = StepResult(
        token_ids=np.zeros(3, np.int32),
        padded_batch_size=8,
        padded_tokens=8,
        cuda_graph=True,
        logits_rows=8,
        forward_ms=1.5,
    )
    recorder.on_step(make_step(make_schedule(make_plan(decodes=[(0, 5), (1, 6), (2, 7)])), result=result))
    texts = [line.text for line in log()]
    assert "Attention forward: is_prefill=False, q=[8, 16, 128], k=[8, 8, 128], v=[8, 8, 128]" in texts
    assert "Storing KV cache: N=8, num_heads=8, head_dim=128, num_slots=3" in texts
    assert "[Rank 0] Output: logits=[8, 151936]" in texts


def test_a_rank_shows_its_own_number_and_its_share_of_the_heads(log):
    facts = replace(FACTS, rank=1, tensor_parallel_size=16)
    schedule = make_schedule(make_plan(decodes=[(0, 5)]))
    recorder = TextRecorder(facts, lambda: MEMORY)
    recorder.on_schedule(schedule)
    recorder.on_step(make_step(schedule))
    texts = [line.text for line in log()]
    assert "[START] [Rank 1] Model forward DECODE" in texts
    assert "Attention forward: is_prefill=False, q=[1, 1, 128], k=[1, 1, 128], v=[1, 1, 128]" in texts


def test_blocks_are_given_back_in_one_line_for_each_sequence_and_commits_have_none(log, recorder):
    given_back = (
        BlockEvent(COMMIT, 9, 0, None, 1, 5, 490),
        BlockEvent(FREE, 3, 0, FINISHED, 0, None, 508),
        BlockEvent(RELEASE, 2, 0, FINISHED, 1, 7, 508),
        BlockEvent(FREE, 1, 0, FINISHED, 0, 7, 509),
        BlockEvent(FREE, 4, 1, FINISHED, 0, None, 510),
    )
    recorder.on_step(make_step(make_schedule(make_plan(decodes=[(0, 5)])), block_events=given_back))
    assert [line for line in log() if line.logger == BLOCKS] == [
        (BLOCKS, "DEBUG", "Deallocated blocks for seq_id=0: freed=2/3, free_blocks=509"),
        (BLOCKS, "DEBUG", "Deallocated blocks for seq_id=1: freed=1/1, free_blocks=510"),
    ]


def test_an_eviction_does_not_split_the_allocation_that_caused_it(log, recorder):
    events = (
        BlockEvent(HIT, 1, 4, None, 1, 7, 2),
        BlockEvent(EVICT, 2, 4, None, 0, 8, 2),
        BlockEvent(ALLOCATE, 2, 4, None, 1, None, 1),
        BlockEvent(EVICT, 3, 4, None, 0, 9, 1),
        BlockEvent(ALLOCATE, 3, 4, None, 1, None, 0),
    )
    recorder.on_schedule(
        make_schedule(make_plan(prefills=[(4, 0, 40)]), block_events=events, free_blocks=0, used_blocks=10)
    )
    assert [line.text for line in log() if line.logger == BLOCKS] == [
        "Allocating blocks for seq_id=4, num_blocks=3",
        "Allocated blocks for seq_id=4: new=2, cache_hits=1, free_blocks=0, used_blocks=10",
    ]


def test_finished_sequences_are_named_with_their_reason_and_counted(log, recorder):
    finished = (FinishedSequence(0, 256, "max_tokens"), FinishedSequence(3, 7, "eos"))
    recorder.on_step(make_step(make_schedule(make_plan(decodes=[(0, 5), (3, 6), (4, 7)])), finished=finished))
    assert [line for line in log() if line.logger == SCHEDULER] == [
        (SCHEDULER, "DEBUG", "Sequence finished: seq_id=0, output_len=256, reason=max_tokens"),
        (SCHEDULER, "DEBUG", "Sequence finished: seq_id=3, output_len=7, reason=eos"),
        (SCHEDULER, "DEBUG", "Postprocess: 2/3 sequences finished"),
    ]


def test_an_aborted_sequence_has_its_blocks_and_its_end_in_the_log(log, recorder):
    recorder.on_abort(7, BlockEvents.of([BlockEvent(FREE, 3, 2, ABORTED, 0, None, 512)]))
    recorder.on_request(aborted_request(2, num_output_tokens=4))
    assert log() == [
        (BLOCKS, "DEBUG", "Deallocated blocks for seq_id=2: freed=1/1, free_blocks=512"),
        (SCHEDULER, "DEBUG", "Sequence finished: seq_id=2, output_len=4, reason=abort"),
    ]


def aborted_request(seq_id: int, num_output_tokens: int) -> RequestEvent:
    return RequestEvent(
        seq_id=seq_id,
        row=0,
        sample=0,
        request_id="0",
        num_prompt_tokens=3,
        num_cached_tokens=0,
        num_output_tokens=num_output_tokens,
        arrived_ns=0,
        first_scheduled_ns=None,
        first_token_ns=None,
        finished_ns=5,
        num_preemptions=0,
        finish_reason="aborted",
    )


def test_the_first_preemption_of_a_run_warns_with_advice_and_later_ones_inform(log, recorder):
    preemptions = (Preemption(7, 12, 3, 1), Preemption(6, 2, 5, 2))
    plan = make_plan(decodes=[(0, 5)])
    recorder.on_start(1, 1, None)
    recorder.on_schedule(
        make_schedule(plan, preemptions=preemptions, block_events=(BlockEvent(FREE, 3, 7, PREEMPTED, 0, None, 3),))
    )
    recorder.on_start(1, 1, None)
    recorder.on_schedule(make_schedule(plan, preemptions=preemptions[:1]))
    first, second, third = (line for line in log() if line.text.startswith("Preempted"))
    assert (first.logger, first.level) == (SCHEDULER, "WARNING")
    assert first.text.startswith("Preempted seq_id=7: freed=12, free_blocks=3, num_preemptions=1 - ")
    for key in ("more memory", "kv.num_blocks", "kv.memory_fraction", "engine.max_num_seqs"):
        assert key in first.text
    assert second == (SCHEDULER, "INFO", "Preempted seq_id=6: freed=2, free_blocks=5, num_preemptions=2")
    assert third == (SCHEDULER, "INFO", "Preempted seq_id=7: freed=12, free_blocks=3, num_preemptions=1")


def test_decode_lines_are_informative_at_the_first_each_tenth_each_new_size_and_each_preemption(log, recorder):
    """35 decode steps, a prefill step in between, two changes of size, one preemption that keeps the size."""
    sizes = dict.fromkeys(range(1, 36), 2) | dict.fromkeys(range(14, 27), 3)
    for step, size in sizes.items():
        if step == 8:
            recorder.on_schedule(make_schedule(make_plan(prefills=[(50, 0, 4)])))
        preemptions = (Preemption(9, 1, 1, 1),) if step == 33 else ()
        plan = make_plan(decodes=[(seq_id, 10 + step) for seq_id in range(size)])
        recorder.on_schedule(make_schedule(plan, preemptions=preemptions))
    decode_lines = [line for line in log() if line.text.startswith("Scheduled DECODE")]
    numbers = [int(re.search(r"\(step (\d+)\)", line.text)[1]) for line in decode_lines]
    levels = {number: line.level for number, line in zip(numbers, decode_lines, strict=True)}
    assert numbers == list(range(1, 36))
    assert {number for number, level in levels.items() if level == "INFO"} == {1, 10, 14, 20, 27, 30, 33}
    assert set(levels.values()) == {"INFO", "DEBUG"}
    assert "preempted=1" in decode_lines[32].text


def test_decode_steps_are_counted_anew_in_each_generation(log, recorder):
    for _ in range(2):
        recorder.on_start(1, 1, None)
        recorder.on_schedule(make_schedule(make_plan(decodes=[(0, 5)])))
    decode_lines = [line for line in log() if line.text.startswith("Scheduled DECODE")]
    assert [(line.level, "(step 1)" in line.text) for line in decode_lines] == [("INFO", True)] * 2


def test_more_than_sixteen_sequences_are_cut_at_info_and_complete_at_debug(log, recorder, caplog):
    decode = make_schedule(make_plan(decodes=[(seq_id, 9) for seq_id in range(256)]))
    prefill = make_schedule(make_plan(prefills=[(seq_id, 0, 2) for seq_id in range(17)]))
    caplog.set_level(logging.INFO, logger="nanovllm")
    recorder.on_schedule(decode)
    recorder.on_schedule(prefill)
    cut_decode, cut_prefill = (line.text for line in log())
    assert cut_decode.endswith("seq_14(len=9), seq_15(len=9), ... +240 more]")
    assert cut_prefill.endswith("seq_15(len=2,cached=0), ... +1 more]")
    caplog.set_level(logging.DEBUG, logger="nanovllm")
    recorder.on_schedule(decode)
    recorder.on_schedule(prefill)
    complete = [line.text for line in log() if line.text.startswith("Scheduled")]
    assert complete[0].endswith("seq_254(len=9), seq_255(len=9)]")
    assert complete[1].endswith("seq_16(len=2,cached=0)]")
    assert not any("more" in text for text in complete)


def test_exactly_sixteen_sequences_are_all_named(log, recorder, caplog):
    caplog.set_level(logging.INFO, logger="nanovllm")
    recorder.on_schedule(make_schedule(make_plan(decodes=[(seq_id, 9) for seq_id in range(16)])))
    assert log()[0].text.endswith("seq_15(len=9)]")


def test_final_statistics_give_each_step_the_time_that_no_earlier_step_had(log, recorder):
    """Steps overlap by look-ahead; the next is scheduled before the last is committed. Mixed counts as prefill."""
    second = 1_000_000_000
    prefill = make_schedule(make_plan(0, prefills=[(0, 0, 5), (1, 0, 5)]), start_ns=10 * second)
    decode = make_schedule(make_plan(1, decodes=[(0, 6), (1, 6)]), start_ns=10 * second + 500_000_000)
    mixed = make_schedule(make_plan(2, decodes=[(0, 7), (1, 7)], prefills=[(2, 0, 4)]), start_ns=14 * second)
    recorder.on_start(3, 14, None)
    recorder.on_schedule(prefill)
    recorder.on_schedule(decode)
    recorder.on_step(make_step(prefill, end_ns=12 * second))
    recorder.on_step(make_step(decode, end_ns=13 * second + 250_000_000, sampled=[True, False]))
    recorder.on_schedule(mixed)
    recorder.on_step(make_step(mixed, end_ns=15 * second, dropped=(1,)))
    log()
    recorder.on_end()
    # prefill 10..12 and mixed 14..15; decode 12..13.25. Sampled 2 + 1 + 3, one of them dropped.
    assert log() == [
        (ENGINE, "INFO", "Generation complete: 3 steps, total_output_tokens=5, prefill_time=3.00s, decode_time=1.25s"),
        (ENGINE, "INFO", f"After generation - {MEMORY}"),
        (ENGINE, "INFO", "-" * 80),
    ]


class Unprintable(int):
    """Raises as soon as anything puts it into a string."""

    def __format__(self, format_spec: str) -> str:
        raise AssertionError("a string was built for a line that is off")

    __str__ = __repr__ = lambda self: format(self)


class UnreadableEvents(BlockEvents):
    """Raises as soon as anything looks at one of the events."""

    def __iter__(self) -> Iterator[BlockEvent]:
        raise AssertionError("a string was built for a line that is off")

    __getitem__ = __iter__


def test_at_warning_no_string_is_built_and_no_memory_is_asked(log, caplog):
    number = Unprintable(5)

    def memory() -> str:
        raise AssertionError("memory was asked for a line that is off")

    events = UnreadableEvents.of(
        [BlockEvent(ALLOCATE, 5, 5, None, 1, None, 5), BlockEvent(FREE, 1, 5, FINISHED, 0, 1, 9)]
    )
    plan = replace(
        make_plan(decodes=[(0, 5)], prefills=[(1, 0, 5)]), seq_ids=np.array([number, number], dtype=object), step=number
    )
    schedule = replace(make_schedule(plan, block_events=events), cached_tokens=np.array([number] * 2, dtype=object))
    result = StepResult(token_ids=np.zeros(2, np.int32), forward_ms=number, logits_rows=number)
    step = make_step(schedule, result=result, finished=(FinishedSequence(number, number, "eos"),), block_events=events)
    recorder = TextRecorder(replace(FACTS, vocab_size=number, head_dim=number), memory)

    caplog.set_level(logging.WARNING, logger="nanovllm")
    recorder.on_start(number, number, None)
    recorder.on_schedule(schedule)
    recorder.on_step(step)
    recorder.on_abort(3, events)
    recorder.on_request(aborted_request(number, number))
    recorder.on_end()
    lines.log_engine_start("model", {"key": number})
    lines.log_model_config({"key": number})
    lines.log_memory(lines.RUNNER, "After model loading", memory)
    lines.log_kv_cache(num_kv_heads=number, head_dim=number, block_size=number, num_blocks=number, total_bytes=number)
    assert log() == []

    caplog.set_level(logging.DEBUG, logger="nanovllm")
    with pytest.raises(AssertionError, match="a string was built"):
        recorder.on_schedule(schedule)
