"""Lines about one step, from what was planned and what came back. Each function checks its level before anything."""

import logging

from nanovllm.engine.plan import Plan, StepResult
from nanovllm.events import FinishedSequence, Preemption, ScheduleEvent, StepEvent
from nanovllm.logging.lines import ATTENTION, RUNNER, SCHEDULER
from nanovllm.logging.model_facts import ModelFacts

MAX_LISTED = 16
"""Sequences named in a line while DEBUG is off."""

PREEMPTION_ADVICE = (
    "the KV cache is too small for what runs at once; to avoid recomputing, give it more memory "
    "(kv.num_blocks or kv.memory_fraction) or lower engine.max_num_seqs"
)


def log_preemption(preemption: Preemption, *, with_advice: bool) -> None:
    """INFO, or WARNING with the advice."""
    level = logging.WARNING if with_advice else logging.INFO
    if not SCHEDULER.isEnabledFor(level):
        return
    line = (
        f"Preempted seq_id={preemption.seq_id}: freed={preemption.freed_blocks}, "
        f"free_blocks={preemption.free_blocks}, num_preemptions={preemption.num_preemptions}"
    )
    SCHEDULER.log(level, f"{line} - {PREEMPTION_ADVICE}" if with_advice else line)


def log_scheduled_prefill(event: ScheduleEvent) -> None:
    """INFO; `len` is the sequence's context after the step."""
    if not SCHEDULER.isEnabledFor(logging.INFO):
        return
    plan, first = event.plan, event.plan.num_decodes
    count = plan.num_rows - first
    shown = slice(first, first + _num_listed(count))
    contexts = plan.starts[shown] + plan.num_tokens[shown]
    names = [
        f"seq_{seq_id}(len={context},cached={cached})"
        for seq_id, context, cached in zip(
            plan.seq_ids[shown].tolist(), contexts.tolist(), event.cached_tokens[shown].tolist(), strict=True
        )
    ]
    SCHEDULER.info(
        f"Scheduled PREFILL batch: size={count}, batched_tokens={plan.num_prefill_tokens}, seqs={_list(names, count)}"
    )


def log_scheduled_decode(event: ScheduleEvent, number: int, level: int) -> None:
    """`number` counts decode steps; the caller knows which level the step deserves."""
    if not SCHEDULER.isEnabledFor(level):
        return
    plan = event.plan
    count = plan.num_decodes
    shown = slice(0, _num_listed(count))
    contexts = plan.starts[shown] + plan.num_tokens[shown]
    names = [
        f"seq_{seq_id}(len={context})"
        for seq_id, context in zip(plan.seq_ids[shown].tolist(), contexts.tolist(), strict=True)
    ]
    SCHEDULER.log(
        level,
        f"Scheduled DECODE batch (step {number}): size={count}, preempted={len(event.preemptions)}, "
        f"seqs={_list(names, count)}",
    )


def log_launch(plan: Plan, facts: ModelFacts) -> None:
    """DEBUG lines before the launch; a mixed step has the lines of both its parts, and one START."""
    if not RUNNER.isEnabledFor(logging.DEBUG):
        return
    if plan.num_decodes < plan.num_rows:
        _log_prefill_tensors(plan, facts.rank)
    if plan.num_decodes:
        _log_decode_tensors(plan, facts)
    RUNNER.debug(f"[START] [Rank {facts.rank}] Model forward {plan.phase.upper()}")


def log_forward_end(event: StepEvent, facts: ModelFacts) -> None:
    """DEBUG lines of a step that has run."""
    if not RUNNER.isEnabledFor(logging.DEBUG):
        return
    phase, result = event.schedule.plan.phase.upper(), event.result
    RUNNER.debug(f"[END] [Rank {facts.rank}] Model forward {phase} - Elapsed: {result.forward_ms:.2f}ms")
    RUNNER.debug(f"[Rank {facts.rank}] Output: logits=[{result.logits_rows}, {facts.vocab_size}]")


def log_attention(plan: Plan, result: StepResult, facts: ModelFacts) -> None:
    """DEBUG lines of one attention layer, which stand for all: their shapes are the same.

    Where a CUDA graph ran, the tensors have its padded size, while `num_slots` counts the tokens that are stored.
    """
    if not ATTENTION.isEnabledFor(logging.DEBUG):
        return
    num_slots = int(plan.num_tokens.sum())
    rows = result.padded_tokens if result.cuda_graph else num_slots
    query = f"[{rows}, {facts.query_heads_per_rank}, {facts.head_dim}]"
    key = f"[{rows}, {facts.kv_heads_per_rank}, {facts.head_dim}]"
    has_prefill = plan.num_decodes < plan.num_rows
    ATTENTION.debug(f"Attention forward: is_prefill={has_prefill}, q={query}, k={key}, v={key}")
    ATTENTION.debug(
        f"Storing KV cache: N={rows}, num_heads={facts.kv_heads_per_rank}, head_dim={facts.head_dim}, "
        f"num_slots={num_slots}"
    )
    if plan.num_decodes:
        cache = list(facts.kv_cache_shape)
        ATTENTION.debug(f"Decode attention: k_cache={cache}, v_cache={cache}")
    ATTENTION.debug(f"Attention output: {query}")


def log_sequence_finished(finished: FinishedSequence) -> None:
    if SCHEDULER.isEnabledFor(logging.DEBUG):
        SCHEDULER.debug(
            f"Sequence finished: seq_id={finished.seq_id}, output_len={finished.num_output_tokens}, "
            f"reason={finished.reason}"
        )


def log_postprocess(num_finished: int, batch_size: int) -> None:
    if SCHEDULER.isEnabledFor(logging.DEBUG):
        SCHEDULER.debug(f"Postprocess: {num_finished}/{batch_size} sequences finished")


def _log_prefill_tensors(plan: Plan, rank: int) -> None:
    rows = slice(plan.num_decodes, None)
    count, total = plan.num_rows - plan.num_decodes, plan.num_prefill_tokens
    longest_query = int(plan.num_tokens[rows].max())
    longest_key = int((plan.starts[rows] + plan.num_tokens[rows]).max())
    RUNNER.debug(f"[Rank {rank}] Preparing PREFILL batch: {count} sequences")
    RUNNER.debug(f"[Rank {rank}] PREFILL tensors: input_ids=[{total}], positions=[{total}], slot_mapping=[{total}]")
    RUNNER.debug(
        f"[Rank {rank}] PREFILL: max_seqlen_q={longest_query}, max_seqlen_k={longest_key}, total_tokens={total}"
    )


def _log_decode_tensors(plan: Plan, facts: ModelFacts) -> None:
    count, rank = plan.num_decodes, facts.rank
    longest = int((plan.starts[:count] + plan.num_tokens[:count]).max())
    columns = -(-longest // facts.block_size)
    RUNNER.debug(f"[Rank {rank}] Preparing DECODE batch: {count} sequences")
    RUNNER.debug(
        f"[Rank {rank}] DECODE tensors: input_ids=[{count}], positions=[{count}], context_lens=[{count}], "
        f"block_tables=[{count}, {columns}]"
    )


def _num_listed(count: int) -> int:
    return count if SCHEDULER.isEnabledFor(logging.DEBUG) else min(count, MAX_LISTED)


def _list(names: list[str], count: int) -> str:
    rest = count - len(names)
    return f"[{', '.join(names)}, ... +{rest} more]" if rest else f"[{', '.join(names)}]"
