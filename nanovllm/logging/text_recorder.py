"""The text log of a run, written from the engine's events."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.events import (
    ArrivalEvent,
    BlockEvents,
    FinishedSequence,
    Recorder,
    RequestEvent,
    ScheduleEvent,
    StepEvent,
)
from nanovllm.logging.block_lines import log_block_events
from nanovllm.logging.lines import ENGINE, THIN_RULE, log_memory
from nanovllm.logging.model_facts import ModelFacts
from nanovllm.logging.step_lines import (
    log_attention,
    log_forward_end,
    log_launch,
    log_postprocess,
    log_preemption,
    log_scheduled_decode,
    log_scheduled_prefill,
    log_sequence_finished,
)

__all__ = ["ModelFacts", "TextRecorder"]

DECODE_LINE_EVERY = 10
"""Of the decode steps that bring nothing new, every one divisible by this has its line at INFO, not at DEBUG."""


class TextRecorder(Recorder):
    """Writes the lines of a run to the loggers of `nanovllm.logging.lines`.

    `memory` gives the text of a memory line and is called only when one is shown. At a level that is off, no string
    is built and `memory` is not called. Counts start anew with each generation; the advice that comes with a
    preemption is given once.
    """

    def __init__(self, facts: ModelFacts, memory: Callable[[], str]) -> None:
        self._facts = facts
        self._memory = memory
        self._has_advised = False
        self._totals = _Totals()
        self._decode_lines = _DecodeLines()

    def on_start(self, num_prompts: int | None, num_prompt_tokens: int | None, source: str | None) -> None:
        self._totals = _Totals(is_streaming=num_prompts is None)
        self._decode_lines = _DecodeLines()
        if not ENGINE.isEnabledFor(logging.INFO):
            return
        ENGINE.info(THIN_RULE)
        if num_prompts is None:
            ENGINE.info("Starting generation for prompts streamed from %s", source)
        else:
            ENGINE.info("Starting generation for %d prompts", num_prompts)
            ENGINE.info("Total prompt tokens: %d", num_prompt_tokens)

    def on_arrival(self, event: ArrivalEvent) -> None:
        if event.sample == 0:
            self._totals.num_prompts += 1
            self._totals.num_prompt_tokens += len(event.prompt_token_ids)

    def on_schedule(self, event: ScheduleEvent) -> None:
        plan = event.plan
        log_block_events(event.block_events, event.free_blocks + event.used_blocks)
        for preemption in event.preemptions:
            log_preemption(preemption, with_advice=not self._has_advised)
            self._has_advised = True
        if plan.num_decodes < plan.num_rows:
            log_scheduled_prefill(event)
        if plan.num_decodes:
            level = self._decode_lines.level_of_next(plan.num_decodes, bool(event.preemptions))
            log_scheduled_decode(event, self._decode_lines.num_steps, level)
        log_launch(plan, self._facts)

    def on_step(self, event: StepEvent) -> None:
        plan = event.schedule.plan
        log_attention(plan, event.result, self._facts)
        log_forward_end(event, self._facts)
        for finished in event.finished:
            log_sequence_finished(finished)
        if event.finished:
            log_postprocess(len(event.finished), plan.num_rows)
        log_block_events(event.block_events, event.free_blocks + event.used_blocks)
        self._totals.add(event)

    def on_request(self, event: RequestEvent) -> None:
        # Every other end is in a step's `finished`; a sequence is aborted between steps.
        if event.finish_reason == "aborted":
            log_sequence_finished(FinishedSequence(event.seq_id, event.num_output_tokens, "abort"))

    def on_abort(self, step: int, block_events: BlockEvents) -> None:
        log_block_events(block_events, 0)  # blocks are only given back, and those lines need no total

    def on_end(self) -> None:
        if not ENGINE.isEnabledFor(logging.INFO):
            return
        totals = self._totals
        ENGINE.info(
            f"Generation complete: {totals.num_steps} steps, total_output_tokens={totals.num_output_tokens}, "
            f"prefill_time={totals.prefill_ns / 1e9:.2f}s, decode_time={totals.decode_ns / 1e9:.2f}s"
        )
        if totals.is_streaming:
            ENGINE.info("Total prompts: %d", totals.num_prompts)
            ENGINE.info("Total prompt tokens: %d", totals.num_prompt_tokens)
        log_memory(ENGINE, "After generation", self._memory)
        ENGINE.info(THIN_RULE)


@dataclass(slots=True, kw_only=True)
class _DecodeLines:
    """Decides the level of each decode step's line."""

    num_steps: int = 0
    last_size: int = 0

    def level_of_next(self, size: int, has_preempted: bool) -> int:
        """INFO for the first decode step, every tenth, another size than the last decode step's, a preemption."""
        self.num_steps += 1
        is_news = has_preempted or size != self.last_size or self.num_steps % DECODE_LINE_EVERY == 0
        self.last_size = size
        return logging.INFO if is_news else logging.DEBUG


@dataclass(slots=True, kw_only=True)
class _Totals:
    """Sums of one generation. Steps overlap: a step's own time begins where the one before it ended.

    start 0 ........ end 0
             start 1 ........ end 1
    |----- 0 ------||-- 1 --|
    """

    is_streaming: bool = False
    num_prompts: int = 0
    num_prompt_tokens: int = 0
    num_steps: int = 0
    num_output_tokens: int = 0
    prefill_ns: int = 0
    """Of steps with any prefill token."""
    decode_ns: int = 0
    last_end_ns: int | None = None

    def add(self, event: StepEvent) -> None:
        plan, start_ns = event.schedule.plan, event.schedule.start_ns
        if self.last_end_ns is not None:
            start_ns = max(start_ns, self.last_end_ns)
        own_ns = event.end_ns - start_ns
        if plan.num_decodes < plan.num_rows:
            self.prefill_ns += own_ns
        else:
            self.decode_ns += own_ns
        self.num_steps += 1
        self.num_output_tokens += int(event.sampled.sum()) - len(event.dropped_seq_ids)
        self.last_end_ns = event.end_ns
