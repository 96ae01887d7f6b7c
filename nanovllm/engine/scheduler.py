"""Who runs in a step: continuous batching with chunked prefill."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.commit import Commit, Committer
from nanovllm.engine.event_log import REASON_CODES
from nanovllm.engine.plan import Admission, Plan
from nanovllm.engine.running import Running
from nanovllm.engine.sequence import Ended, Sequence
from nanovllm.events import PREEMPTED, Preemption

_NOTHING = np.empty(0, np.int32)
GROWTH_STEPS = 16
"""A sequence is admitted only while the running ones can grow by this many tokens each: without such a reserve a
newcomer would often be preempted again within a few steps, and its prefill lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A plan, and what scheduling it did to the queues."""

    plan: Plan
    cached_tokens: np.ndarray
    preemptions: tuple[Preemption, ...]
    num_waiting: int
    num_running: int


class Scheduler:
    """Turns waiting and running sequences into plans, and sampled tokens into progress.

    A sequence waits in the queue or runs, in a slot of `Running`.

    A plan may be scheduled before the previous one's tokens are known. A sequence that turns out to have ended while
    a later step of its own is under way keeps slot and blocks until that step is committed, and its token of that
    step is dropped.

    Preemption frees all blocks of the sequence admitted last and puts it first in the queue; it is computed anew from
    its tokens (prompt and output), helped by whatever is still in the prefix cache.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.most_tokens = blocks.num_blocks * blocks.block_size + 1
        """Of a sequence that has all blocks; the last token's KV is never needed."""
        self.waiting: deque[Sequence] = deque()
        self.running = Running(blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self._displaced: dict[int, Sequence] = {}  # preempted with steps under way
        self._ones = np.ones(max_num_seqs, np.int32)
        self._ones.flags.writeable = False  # plans share it
        self._committer = Committer(self.running, self.waiting, self._displaced, eos_token_ids)

    # What a caller may ask

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running.order) - self.running.num_ended

    def has_unfinished(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def limit_of(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Most tokens, prompt included, that such a sequence may reach."""
        most = self.max_model_len
        return min(most, self.most_tokens if max_tokens is None else num_prompt_tokens + max_tokens)

    def blocks_for(self, limit: int) -> int:
        """KV blocks of a sequence that ends at `limit` tokens; the last token's KV is never needed."""
        return -(-(limit - 1) // self.blocks.block_size)

    def live_tables(self) -> dict[int, list[int]]:
        """Block tables of all sequences that hold blocks, by seq_id (for checks, not for the step loop)."""
        running = self.running
        return {
            seq.seq_id: running.table_of(slot).tolist() for slot, seq in enumerate(running.sequences) if seq is not None
        }

    def live_seq_ids(self) -> list[int]:
        """Everything that has not ended: running in order of admission, then waiting."""
        running = self.running
        slots = running.order[~running.ended[running.order]]
        return running.seq_ids[slots].tolist() + [seq.seq_id for seq in self.waiting]

    def longest_leap(self) -> int:
        """Steps from now on that are surely decodes of all that run, whatever is sampled unless it ends a sequence."""
        running, order = self.running, self.running.order
        may_admit = bool(self.waiting and running.free_slots)
        if may_admit or running.num_prefilling or running.num_ended or not len(order):
            return 0
        # Of the tokens up to the limit the last one ends its sequence.
        steps = min(int((running.limit[order] - running.committed[order]).min()) - 1, self.blocks.block_size)
        need = np.count_nonzero(running.capacity[order] - running.computed[order] < steps)
        return steps if need <= self.blocks.num_empty else 0

    # Changes

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the caller has checked that it can ever fit."""
        limit = seq.limit = self.limit_of(seq.num_prompt_tokens, seq.sampling.max_tokens)
        assert 0 < seq.num_prompt_tokens < limit, f"seq_id={seq.seq_id} has no room for an output token"
        assert limit <= self.most_tokens, f"seq_id={seq.seq_id} can never fit"
        self.waiting.append(seq)

    def abort(self, seq_id: int) -> Ended | None:
        """End a sequence from outside; None when it has already ended."""
        for seq in self.waiting:
            if seq.seq_id == seq_id:
                self.waiting.remove(seq)
                self._displaced.pop(seq_id, None)
                return Ended(seq, seq.output_ids(), "abort")
        slots = np.flatnonzero((self.running.seq_ids == seq_id) & ~self.running.ended)
        if not len(slots):
            return None
        (ended,) = self.running.end(slots, ["abort"])
        self.running.release_ended(slots)
        return ended

    def forget_submitted(self) -> None:
        """No result of a submitted step will come any more: what has ended gives its blocks back now.

        Scheduling may have been broken off, too: what it had placed is entered, so that it can be aborted.
        """
        self.running.settle()
        self.running.in_flight[:] = 0
        for seq in self._displaced.values():
            seq.num_in_flight = 0
        self.running.release_ended(self.running.order)

    def schedule(self, step: int, now_ns: int = 0) -> Scheduled | None:
        """The next plan, or None when nothing can run before a result arrives (or nothing is left)."""
        preemptions: list[Preemption] = []
        decodes = self._schedule_decodes(preemptions)
        budget = self.max_num_batched_tokens - len(decodes)
        prefills, budget = self._continue_prefills(budget)
        admissions: list[Admission] = []
        cached: dict[int, int] = {}
        if self.waiting and not preemptions:
            self._admit(budget, prefills, admissions, cached, now_ns)
        if not len(decodes) and not prefills:
            assert not preemptions, "preempted without scheduling anything"
            return None
        plan = self._build_plan(step, decodes, prefills, admissions)
        cached_tokens = np.zeros(plan.num_rows, np.int32)
        if cached:
            cached_tokens[plan.num_decodes :] = [cached.get(slot, 0) for slot, _ in prefills]
        return Scheduled(
            plan=plan,
            cached_tokens=cached_tokens,
            preemptions=tuple(preemptions),
            num_waiting=self.num_waiting,
            num_running=self.num_running,
        )

    def commit(self, plan: Plan, token_ids: np.ndarray, now_ns: int = 0) -> Commit:
        """Take a plan's sampled tokens (int32 [rows that sample], -1 where the logits were not finite)."""
        return self._committer.take(plan, token_ids, now_ns)

    # Scheduling

    def _schedule_decodes(self, preemptions: list[Preemption]) -> np.ndarray:
        """Slots that decode in this step, in order of admission; makes room for their next token."""
        running = self.running
        order = running.order
        if not len(order):
            return order
        growing = running.length[order] < running.limit[order]
        if running.num_ended:
            growing &= ~running.ended[order]
        ready = order[growing]
        if running.num_prefilling:
            ready = ready[running.computed[ready] >= running.prefill_end[ready]]
        need = ready[running.computed[ready] == running.capacity[ready]]
        while len(need) > self.blocks.num_free:
            # Sequences that end with a step under way give their blocks back soon: wait for them, preempt nobody.
            if len(order) > np.count_nonzero(growing):
                blocked = need[-1]
            else:
                blocked = order[-1]
                preemptions.append(self._preempt(int(blocked)))
                order = running.order
                growing = growing[:-1]
            ready, need = ready[ready != blocked], need[need != blocked]
        if len(need):
            running.grow(need)
        return ready

    def _preempt(self, slot: int) -> Preemption:
        running = self.running
        seq = running.sequence_in(slot)
        seq.token_ids = running.tokens[slot, : running.committed[slot]].copy()
        seq.num_in_flight = int(running.in_flight[slot])
        seq.num_preemptions += 1
        if seq.num_in_flight:
            self._displaced[seq.seq_id] = seq
        freed = running.leave(np.array([slot]), np.array([REASON_CODES[PREEMPTED]]))
        self.waiting.appendleft(seq)
        return Preemption(seq.seq_id, freed, self.blocks.num_free, seq.num_preemptions)

    def _continue_prefills(self, budget: int) -> tuple[list[tuple[int, int]], int]:
        """(slot, tokens) of sequences whose prefill has begun, and the budget that is left."""
        prefills: list[tuple[int, int]] = []
        running = self.running
        if not running.num_prefilling:
            return prefills, budget
        order = running.order
        begun = order[(running.computed[order] < running.prefill_end[order]) & ~running.ended[order]]
        for slot in begun.tolist():
            count = min(int(running.prefill_end[slot] - running.computed[slot]), budget)
            if count:
                prefills.append((slot, count))
                budget -= count
        return prefills, budget

    def _admit(
        self,
        budget: int,
        prefills: list[tuple[int, int]],
        admissions: list[Admission],
        cached: dict[int, int],
        now_ns: int,
    ) -> None:
        """Give slots and blocks to waiting sequences, first come first served, while all of these last."""
        running, blocks, waiting, block_size = self.running, self.blocks, self.waiting, self.blocks.block_size
        find_prefix, place = blocks.find_prefix, running.place
        num_free, num_wanted, now_running = blocks.num_free, 0, len(running.order)
        while waiting and budget > 0 and running.free_slots:
            seq = waiting[0]
            if seq.num_in_flight:
                break
            token_ids = seq.token_ids
            num_tokens = len(token_ids)
            # At least the last token is always computed.
            hits = find_prefix(token_ids, seq.prefix_hashes, (num_tokens - 1) // block_size)
            num_hits = len(hits)
            num_wanted += -(-num_tokens // block_size) - num_hits + (running.num_unused(hits) if num_hits else 0)
            reserve = -(-now_running * GROWTH_STEPS // block_size)
            if num_wanted + reserve > num_free:
                break
            waiting.popleft()
            if seq.num_preemptions:
                self._displaced.pop(seq.seq_id, None)
            slot = place(seq, hits, now_ns)
            now_running += 1
            num_cached = num_hits * block_size
            count = min(num_tokens - num_cached, budget)
            budget -= count
            prefills.append((slot, count))
            admissions.append(Admission(slot, seq.seq_id, seq.row, seq.sample, seq.sampling))
            if num_cached:
                cached[slot] = num_cached
        running.settle()

    def _build_plan(
        self, step: int, decodes: np.ndarray, prefills: list[tuple[int, int]], admissions: list[Admission]
    ) -> Plan:
        running = self.running
        slots, num_tokens, prefill_ids = decodes, self._ones[: len(decodes)], _NOTHING
        if prefills:
            slots = np.concatenate([decodes, [slot for slot, _ in prefills]])
            num_tokens = np.concatenate([num_tokens, np.array([count for _, count in prefills], np.int32)])
            tokens, first = running.tokens, running.computed[slots[len(decodes) :]].tolist()
            prefill_ids = np.concatenate(
                [tokens[slot, at : at + count] for at, (slot, count) in zip(first, prefills, strict=True)]
            )
        starts, samples = running.advance(slots, num_tokens, len(decodes))
        entries = running.drain_table_entries()
        return Plan(
            step=step,
            seq_ids=running.seq_ids[slots],
            slots=slots.astype(np.int32),
            starts=starts,
            num_tokens=num_tokens,
            samples=samples,
            num_decodes=len(decodes),
            prefill_token_ids=prefill_ids,
            admissions=tuple(admissions),
            table_slots=entries.slots,
            table_columns=entries.columns,
            table_blocks=entries.blocks,
        )
