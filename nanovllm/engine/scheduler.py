"""Who runs in a step: continuous batching with chunked prefill, over persistent arrays with one slot per sequence."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanovllm.engine.block_manager import ROOT, BlockManager
from nanovllm.engine.plan import Admission, Plan
from nanovllm.engine.sequence import Sequence
from nanovllm.events import ABORTED, FINISHED, PREEMPTED, FinishedSequence, Preemption

GROWTH_STEPS = 16
"""A sequence is admitted only while the running ones can grow by this many tokens each: without such a reserve a
newcomer would often be preempted again within a few steps, and its prefill lost."""

CUT = -1
"""In place of a content number: a hash collision has ended the chain, and no more blocks are published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A plan, and what scheduling it did to the queues."""

    plan: Plan
    cached_tokens: np.ndarray
    preemptions: tuple[Preemption, ...]
    num_waiting: int
    num_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A sequence that has just ended, with all its output."""

    sequence: Sequence
    token_ids: np.ndarray
    reason: str
    """eos, stop, max_tokens, abort or error"""

    def fact(self) -> FinishedSequence:
        return FinishedSequence(self.sequence.seq_id, len(self.token_ids), self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a step's tokens did."""

    ended: list[Ended]
    dropped_seq_ids: tuple[int, ...]
    sampled: np.ndarray
    """bool [rows of the plan]"""


class _TableEntries(NamedTuple):
    """table[slot, column] = block, each int32 [entries]"""

    slots: np.ndarray
    columns: np.ndarray
    blocks: np.ndarray


class Scheduler:
    """Turns waiting and running sequences into plans, and sampled tokens into progress.

    Running sequences hold a slot: a place in arrays that are updated, never rebuilt, so that a decode step of
    hundreds of sequences costs a fixed number of array operations. Of a sequence in slot s

        0 ..... computed[s]            KV is there, or will be once the submitted steps have run
        0 ..... committed[s]           tokens are known
        0 ..... length[s]              tokens are known or being sampled by a submitted step
        0 ..... prefill_end[s]         tokens that were known when it was admitted; below this it is prefilling
        0 ..... limit[s]               it ends here at the latest

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
        self.waiting: deque[Sequence] = deque()
        self._eos_token_ids = eos_token_ids
        self._displaced: dict[int, Sequence] = {}  # preempted with steps under way
        self._sequences: list[Sequence | None] = [None] * max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._order = np.empty(0, np.int32)  # slots, in order of admission
        self._num_prefilling = 0
        self._num_ended = 0

        def per_slot(dtype: type, value: int = 0) -> np.ndarray:
            return np.full(max_num_seqs, value, dtype)

        most_blocks = -(-max_model_len // blocks.block_size)
        self._token_blocks = np.empty((max_num_seqs, most_blocks, blocks.block_size), np.int32)
        self._tokens = self._token_blocks.reshape(max_num_seqs, -1)
        self._tables = np.full((max_num_seqs, most_blocks), blocks.num_blocks, np.int32)
        self._slot_seq_id = per_slot(np.int64, -1)
        self._computed = per_slot(np.int32)
        self._committed = per_slot(np.int32)
        self._length = per_slot(np.int32)
        self._prefill_end = per_slot(np.int32)
        self._limit = per_slot(np.int32)
        self._capacity = per_slot(np.int32)
        self._published = per_slot(np.int32)
        self._parent = per_slot(np.int64, ROOT)  # content number of the last published block, or CUT
        self._in_flight = per_slot(np.int32)
        self._ended = per_slot(np.bool_)
        self._stops_at_eos = per_slot(np.bool_)
        self._has_own_stops = per_slot(np.bool_)
        self._has_first_token = per_slot(np.bool_)

        self._new_entries: list[_TableEntries] = []  # for the next plan

    # What a caller may ask

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self._order) - self._num_ended

    def has_unfinished(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def limit_of(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Most tokens, prompt included, that such a sequence may reach."""
        most = self.max_model_len
        if max_tokens is None:
            return min(most, self.blocks.num_blocks * self.blocks.block_size + 1)
        return min(most, num_prompt_tokens + max_tokens)

    def blocks_for(self, limit: int) -> int:
        """KV blocks of a sequence that ends at `limit` tokens; the last token's KV is never needed."""
        return -(-(limit - 1) // self.blocks.block_size)

    def live_tables(self) -> dict[int, list[int]]:
        """Block tables of all sequences that hold blocks, by seq_id (for checks, not for the step loop)."""
        return {seq.seq_id: self._table_of(seq.slot).tolist() for seq in self._sequences if seq is not None}

    def live_seq_ids(self) -> list[int]:
        """Everything that has not ended: running in order of admission, then waiting."""
        running = self._order[~self._ended[self._order]]
        return self._slot_seq_id[running].tolist() + [seq.seq_id for seq in self.waiting]

    # Changes

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the caller has checked that it can ever fit."""
        limit = self.limit_of(seq.num_prompt_tokens, seq.sampling.max_tokens)
        assert 0 < seq.num_prompt_tokens < limit, f"seq_id={seq.seq_id} has no room for an output token"
        assert self.blocks_for(limit) <= self.blocks.num_blocks, f"seq_id={seq.seq_id} can never fit"
        self.waiting.append(seq)

    def abort(self, seq_id: int) -> Ended | None:
        """End a sequence from outside; None when it has already ended."""
        for seq in self.waiting:
            if seq.seq_id == seq_id:
                self.waiting.remove(seq)
                self._displaced.pop(seq_id, None)
                return self._ended_waiting(seq, "abort")
        slots = np.flatnonzero((self._slot_seq_id == seq_id) & ~self._ended)
        if not len(slots):
            return None
        ended = self._end(int(slots[0]), "abort")
        self._release_ended(slots)
        return ended

    def forget_submitted(self) -> None:
        """No result of a submitted step will come any more: what has ended gives its blocks back now."""
        self._in_flight[:] = 0
        for seq in self._displaced.values():
            seq.num_in_flight = 0
        self._release_ended(self._order)

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
        rows = np.flatnonzero(plan.samples)
        assert len(rows) == len(token_ids), f"{len(rows)} rows sample but {len(token_ids)} tokens came back"
        current = self._slot_seq_id[plan.slots] == plan.seq_ids
        slots, tokens, good = plan.slots[rows], token_ids, token_ids >= 0
        ended: list[Ended] = []
        dropped: list[int] = []
        if current.all() and not self._num_ended:
            self._in_flight[plan.slots] -= 1
        else:
            live = current[rows] & ~self._ended[slots]
            self._commit_displaced(plan, rows[~live], token_ids[~live], current, ended, dropped, now_ns)
            slots, tokens, good = slots[live], token_ids[live], good[live]
        if len(slots):
            self._append_tokens(slots, tokens, good, ended, now_ns)
        if self._num_ended:
            self._release_ended(plan.slots[current])
        sampled = plan.samples
        if not (token_ids >= 0).all():
            sampled = plan.samples.copy()
            sampled[rows] = token_ids >= 0
        return Commit(ended=ended, dropped_seq_ids=tuple(dropped), sampled=sampled)

    # Scheduling

    def _schedule_decodes(self, preemptions: list[Preemption]) -> np.ndarray:
        """Slots that decode in this step, in order of admission; makes room for their next token."""
        order = self._order
        if not len(order):
            return order
        growing = (self._length[order] < self._limit[order]) & ~self._ended[order]
        ready = order[growing & (self._computed[order] >= self._prefill_end[order])]
        need = ready[self._computed[ready] == self._capacity[ready]]
        while len(need) > self.blocks.num_free:
            # Sequences that end with a step under way give their blocks back soon: wait for them, preempt nobody.
            if len(order) > np.count_nonzero(growing):
                blocked = need[-1]
            else:
                blocked = order[-1]
                preemptions.append(self._preempt(int(blocked)))
                order = self._order
                growing = growing[:-1]
            ready, need = ready[ready != blocked], need[need != blocked]
        if len(need):
            self._grow(need, np.ones(len(need), np.int32))
        return ready

    def _continue_prefills(self, budget: int) -> tuple[list[tuple[int, int]], int]:
        """(slot, tokens) of sequences whose prefill has begun, and the budget that is left."""
        prefills: list[tuple[int, int]] = []
        if not self._num_prefilling:
            return prefills, budget
        order = self._order
        begun = order[(self._computed[order] < self._prefill_end[order]) & ~self._ended[order]]
        for slot in begun.tolist():
            count = min(int(self._prefill_end[slot] - self._computed[slot]), budget)
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
        wanted: list[tuple[int, int]] = []  # slot and number of the blocks that are taken in one go
        while self.waiting and budget > 0 and self._free_slots:
            seq = self.waiting[0]
            hits = self._prefix(seq)
            if len(hits) and wanted:
                # These were admitted before: their blocks come first, and a hit may be evicted for them.
                num_cached = self.blocks.num_cached
                self._take_blocks(wanted)
                if self.blocks.num_cached < num_cached:
                    hits = self._prefix(seq)
            if seq.num_in_flight or not self._fits(seq, hits, sum(count for _, count in wanted)):
                break
            self.waiting.popleft()
            self._displaced.pop(seq.seq_id, None)
            self._place(seq, hits, now_ns)
            wanted.append((seq.slot, self._num_blocks_of(seq) - len(hits)))
            num_cached = len(hits) * self.blocks.block_size
            count = min(len(seq.token_ids) - num_cached, budget)
            budget -= count
            prefills.append((seq.slot, count))
            admissions.append(
                Admission(slot=seq.slot, seq_id=seq.seq_id, row=seq.row, sample=seq.sample, sampling=seq.sampling)
            )
            if num_cached:
                cached[seq.slot] = num_cached
        self._take_blocks(wanted)

    def _prefix(self, seq: Sequence) -> np.ndarray:
        """Cached blocks that a waiting sequence can take; at least its last token is always computed."""
        usable = (len(seq.token_ids) - 1) // self.blocks.block_size
        if self.blocks.prefix_caching:
            self.blocks.hash_prompt(seq.prefix_hashes, seq.token_ids, usable)
        return self.blocks.find_prefix(seq.token_ids, seq.prefix_hashes[:usable])

    def _fits(self, seq: Sequence, hits: np.ndarray, num_wanted: int) -> bool:
        need = self._num_blocks_of(seq) - len(hits) + self.blocks.num_unused(hits)
        reserve = -(-len(self._order) * GROWTH_STEPS // self.blocks.block_size)
        return need + reserve + num_wanted <= self.blocks.num_free

    def _num_blocks_of(self, seq: Sequence) -> int:
        return -(-len(seq.token_ids) // self.blocks.block_size)

    def _place(self, seq: Sequence, hits: np.ndarray, now_ns: int) -> None:
        """Move a waiting sequence into a free slot, with `hits` as the first blocks of its table."""
        num_tokens = len(seq.token_ids)
        num_cached = len(hits) * self.blocks.block_size
        if seq.first_scheduled_ns is None:
            seq.first_scheduled_ns = now_ns
            seq.num_cached_tokens = num_cached
        slot = seq.slot = self._free_slots.pop()
        self._sequences[slot] = seq
        self._slot_seq_id[slot] = seq.seq_id
        self._order = np.append(self._order, np.int32(slot))
        self._num_prefilling += 1
        self._tokens[slot, :num_tokens] = seq.token_ids
        self._computed[slot] = num_cached
        self._committed[slot] = self._length[slot] = self._prefill_end[slot] = num_tokens
        self._limit[slot] = self.limit_of(seq.num_prompt_tokens, seq.sampling.max_tokens)
        self._capacity[slot] = 0
        self._in_flight[slot] = 0
        self._stops_at_eos[slot] = not seq.sampling.ignore_eos
        self._has_own_stops[slot] = bool(seq.stop_token_ids) or seq.stop_check is not None
        self._has_first_token[slot] = seq.first_token_ns is not None
        self._published[slot] = len(hits)
        self._parent[slot] = self.blocks.content_of(hits[-1]) if len(hits) else ROOT
        if len(hits):
            self.blocks.hit(seq.seq_id, hits)
            self._enter(slot, hits)

    def _take_blocks(self, wanted: list[tuple[int, int]]) -> None:
        """Take the blocks that are wanted, which are none afterwards."""
        if len(wanted) == 1:  # as where prompts share a prefix; a third of the time that _grow takes
            ((slot, count),) = wanted
            self._enter(slot, self.blocks.allocate(self._slot_seq_id.item(slot), count))
        elif wanted:
            slots, counts = np.array(wanted, np.int32).T
            self._grow(slots, counts)
        wanted.clear()

    def _grow(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """`counts` [slots] more blocks for each slot."""
        owners, columns = _spread(slots, self._capacity[slots] // self.blocks.block_size, counts)
        blocks = self.blocks.allocate(self._slot_seq_id[owners], len(owners))
        self._tables[owners, columns] = blocks
        self._capacity[slots] += counts * self.blocks.block_size
        self._new_entries.append(_TableEntries(owners, columns, blocks))

    def _enter(self, slot: int, blocks: np.ndarray) -> None:
        """Append blocks to a slot's table and to the plan's table updates."""
        first, count = self._num_held(slot), len(blocks)
        self._tables[slot, first : first + count] = blocks
        self._capacity[slot] += count * self.blocks.block_size
        columns = np.arange(first, first + count, dtype=np.int32)
        self._new_entries.append(_TableEntries(np.full(count, slot, np.int32), columns, blocks))

    def _sequence_in(self, slot: int) -> Sequence:
        seq = self._sequences[slot]
        assert seq is not None, f"slot {slot} is empty"
        return seq

    def _num_held(self, slot: int) -> int:
        return self._capacity.item(slot) // self.blocks.block_size

    def _table_of(self, slot: int) -> np.ndarray:
        """A running sequence's blocks."""
        return self._tables[slot, : self._num_held(slot)]

    def _build_plan(
        self, step: int, decodes: np.ndarray, prefills: list[tuple[int, int]], admissions: list[Admission]
    ) -> Plan:
        slots, num_tokens = decodes, np.ones(len(decodes), np.int32)
        prefill_ids = np.empty(0, np.int32)
        if prefills:
            slots = np.concatenate([decodes, np.array([slot for slot, _ in prefills], np.int32)])
            num_tokens = np.concatenate([num_tokens, np.array([count for _, count in prefills], np.int32)])
            prefill_ids = np.concatenate(
                [self._tokens[slot, self._computed[slot] : self._computed[slot] + count] for slot, count in prefills]
            )
        starts = self._computed[slots]
        ends = starts + num_tokens
        samples = ends == self._length[slots]
        self._computed[slots] = ends
        self._length[slots] += samples
        self._in_flight[slots] += 1
        if prefills:
            self._num_prefilling -= int(np.count_nonzero(samples[len(decodes) :]))
        entries = _joined(self._new_entries)
        self._new_entries.clear()
        self._publish_full_blocks(slots)
        return Plan(
            step=step,
            seq_ids=self._slot_seq_id[slots],
            slots=slots,
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

    def _publish_full_blocks(self, slots: np.ndarray) -> None:
        """Tell the prefix index of the slots' blocks that are full once the submitted steps have run.

        A later plan may hit them, and runs after these.
        """
        if not self.blocks.prefix_caching:
            return
        full = self._num_full(slots)
        due = full > self._published[slots]
        if due.any():
            self._publish(slots[due], full[due])

    def _num_full(self, slots: np.ndarray) -> np.ndarray:
        """Blocks of each slot whose tokens are known and have their KV once the submitted steps have run."""
        return np.minimum(self._computed[slots], self._committed[slots]) // self.blocks.block_size

    def _publish(self, slots: np.ndarray, full: np.ndarray) -> None:
        """Offer the slots' first `full` [slots] blocks for reuse, as far as that has not been done."""
        first = self._published[slots]
        self._published[slots] = full
        goes_on = self._parent[slots] != CUT
        if not goes_on.all():
            slots, first, full = slots[goes_on], first[goes_on], full[goes_on]
        counts = full - first
        owners, columns = _spread(slots, first, counts)
        tokens = self._token_blocks[owners, columns]
        hashes = self._hashes_of(slots, first, full, tokens)
        runs = zip(self._slot_seq_id[slots].tolist(), self._parent[slots].tolist(), counts.tolist(), strict=True)
        ends = self.blocks.publish(runs, self._tables[owners, columns], hashes, tokens)
        self._parent[slots] = [CUT if end is None else end for end in ends]

    def _hashes_of(self, slots: np.ndarray, first: np.ndarray, full: np.ndarray, tokens: np.ndarray) -> list[int]:
        """Chained hashes of each slot's blocks from `first` to `full`, which hold `tokens`."""
        hashes: list[int] = []
        data, width = tokens.tobytes(), tokens.itemsize * self.blocks.block_size
        at = 0  # of the slot's first block in `data`
        for slot, start, end in zip(slots.tolist(), first.tolist(), full.tolist(), strict=True):
            seq = self._sequence_in(slot)
            own, past = seq.prefix_hashes, at + (end - start) * width
            if len(own) < end:
                self.blocks.extend_hashes(own, data[at + (len(own) - start) * width : past])
            hashes += own[start:end]
            at = past
        return hashes

    # Leaving

    def _preempt(self, slot: int) -> Preemption:
        seq = self._sequence_in(slot)
        seq.token_ids = self._tokens[slot, : self._committed[slot]].copy()
        seq.num_in_flight = int(self._in_flight[slot])
        seq.num_preemptions += 1
        if seq.num_in_flight:
            self._displaced[seq.seq_id] = seq
        freed = self._leave(np.array([slot], np.int32), [PREEMPTED])
        self.waiting.appendleft(seq)
        return Preemption(seq.seq_id, freed, self.blocks.num_free, seq.num_preemptions)

    def _leave(self, slots: np.ndarray, reasons: list[str]) -> int:
        """Give back slots and their blocks, one after the other; returns how many blocks have no user left."""
        freed = self._free_blocks(slots, reasons)
        self._num_prefilling -= int(np.count_nonzero(self._computed[slots] < self._prefill_end[slots]))
        listed = slots.tolist()
        for slot in listed:
            self._sequence_in(slot).slot = -1
            self._sequences[slot] = None
        self._capacity[slots] = 0
        self._slot_seq_id[slots] = -1
        self._order = self._order[self._slot_seq_id[self._order] >= 0]
        self._free_slots += listed
        return freed

    def _free_blocks(self, slots: np.ndarray, reasons: list[str]) -> int:
        """What a sequence has not published yet is published just before its blocks are freed."""
        full = self._num_full(slots)
        due = np.flatnonzero(full > self._published[slots]).tolist() if self.blocks.prefix_caching else []
        freed, first = 0, 0
        for end in [*due, len(slots)]:
            if first < end:
                part = slots[first:end]
                tables = [self._table_of(slot) for slot in part.tolist()]
                freed += self.blocks.free(self._slot_seq_id[part].tolist(), tables, reasons[first:end])
            if end < len(slots):
                self._publish(slots[end : end + 1], full[end : end + 1])
            first = end
        return freed

    def _end(self, slot: int, reason: str) -> Ended:
        """A running sequence has ended; `_release_ended` follows now, or when its last submitted step is committed."""
        seq = self._sequence_in(slot)
        seq.end_reason = reason
        output = self._tokens[slot, seq.num_prompt_tokens : self._committed[slot]].copy()
        self._ended[slot] = True
        self._num_ended += 1
        return Ended(sequence=seq, token_ids=output, reason=reason)

    def _release_ended(self, slots: np.ndarray) -> None:
        """Those of the slots whose sequence has ended, and whose submitted steps are all committed, are given back."""
        slots = slots[self._ended[slots] & (self._in_flight[slots] == 0)]
        if not len(slots):
            return
        self._ended[slots] = False
        self._num_ended -= len(slots)
        self._leave(slots, [self._free_reason(slot) for slot in slots.tolist()])

    def _free_reason(self, slot: int) -> str:
        return ABORTED if self._sequence_in(slot).end_reason == "abort" else FINISHED

    def _ended_waiting(self, seq: Sequence, reason: str) -> Ended:
        seq.end_reason = reason
        return Ended(sequence=seq, token_ids=seq.token_ids[seq.num_prompt_tokens :], reason=reason)

    # Committing

    def _append_tokens(
        self, slots: np.ndarray, tokens: np.ndarray, good: np.ndarray, ended: list[Ended], now_ns: int
    ) -> None:
        """Tokens of sequences that still run; the ones that end with it go to `ended`."""
        at = self._committed[slots]
        self._tokens[slots, at] = tokens  # a bad row's -1 stays outside of committed
        self._committed[slots] = at + good
        eos = np.zeros(len(slots), np.bool_)
        for token_id in self._eos_token_ids:
            eos |= tokens == token_id
        eos &= self._stops_at_eos[slots]
        stopped = self._own_stops(slots, tokens, good & ~eos)
        done = (self._committed[slots] >= self._limit[slots]) | eos | stopped | ~good
        first = good & ~self._has_first_token[slots]
        if first.any():
            self._note_first_tokens(slots[first], now_ns)
        for i in np.flatnonzero(done).tolist():
            reason = "error" if not good[i] else "eos" if eos[i] else "stop" if stopped[i] else "max_tokens"
            ended.append(self._end(int(slots[i]), reason))
        if len(ended):
            self._release_ended(slots[done])

    def _own_stops(self, slots: np.ndarray, tokens: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which rows end by a stop token or stop string of their own."""
        stopped = np.zeros(len(slots), np.bool_)
        own = self._has_own_stops[slots]
        if not own.any():
            return stopped
        for i in np.flatnonzero(own & candidates).tolist():
            seq = self._sequence_in(slots[i])
            stopped[i] = seq.stops_with(int(tokens[i]))
        return stopped

    def _note_first_tokens(self, slots: np.ndarray, now_ns: int) -> None:
        self._has_first_token[slots] = True
        for slot in slots.tolist():
            seq = self._sequence_in(slot)
            seq.first_token_ns = now_ns

    def _commit_displaced(
        self,
        plan: Plan,
        rows: np.ndarray,
        tokens: np.ndarray,
        current: np.ndarray,
        ended: list[Ended],
        dropped: list[int],
        now_ns: int,
    ) -> None:
        """Plan rows whose sequence has been preempted, aborted or ended since the plan was submitted.

        `rows` are those of them that sampled, `tokens` what they sampled; `current` [rows of the plan] is whether a
        row's sequence still has its slot.
        """
        self._in_flight[plan.slots[current]] -= 1
        for seq_id in plan.seq_ids[~current].tolist():
            if seq_id in self._displaced:
                self._displaced[seq_id].num_in_flight -= 1
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            seq_id = int(plan.seq_ids[row])
            seq = None if current[row] else self._displaced.get(seq_id)
            if seq is not None:
                self._append_displaced(seq, token, ended, now_ns)
            elif token >= 0:
                dropped.append(seq_id)

    def _append_displaced(self, seq: Sequence, token: int, ended: list[Ended], now_ns: int) -> None:
        """The token of a sequence that was preempted while the step that sampled it was under way."""
        if token >= 0:
            seq.token_ids = np.append(seq.token_ids, np.int32(token))
            if seq.first_token_ns is None:
                seq.first_token_ns = now_ns
        if token < 0:
            reason = "error"
        elif token in self._eos_token_ids and not seq.sampling.ignore_eos:
            reason = "eos"
        elif seq.stops_with(token):
            reason = "stop"
        else:  # nobody is preempted whose last token is under way
            return
        self.waiting.remove(seq)
        del self._displaced[seq.seq_id]
        ended.append(self._ended_waiting(seq, reason))


def _joined(entries: list[_TableEntries]) -> _TableEntries:
    if not entries:
        nothing = np.empty(0, np.int32)
        return _TableEntries(nothing, nothing, nothing)
    return _TableEntries(*(np.concatenate(parts) for parts in zip(*entries, strict=True)))


def _spread(slots: np.ndarray, first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `counts` [slots] blocks from column `first` [slots] on, one slot after the other: the slot and the column."""
    if len(slots) == counts.sum() and counts.all():  # one each, as in a decode step
        return slots, first
    owners = np.repeat(slots, counts)
    columns = np.arange(len(owners), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts - first, counts)
    return owners, columns.astype(np.int32)
