"""The running sequences: persistent arrays with one slot per sequence, and the blocks that a slot holds."""

from typing import NamedTuple

import numpy as np

from nanovllm.engine.block_manager import CUT, ROOT, BlockManager, PublishRuns
from nanovllm.engine.event_log import REASON_CODES
from nanovllm.engine.sequence import Ended, Sequence
from nanovllm.events import ABORTED, FINISHED

_NOTHING = np.empty(0, np.int32)
_ABORTED, _FINISHED = REASON_CODES[ABORTED], REASON_CODES[FINISHED]


class TableEntries(NamedTuple):
    """table[slot, column] = block, each [entries]"""

    slots: np.ndarray
    columns: np.ndarray
    blocks: np.ndarray


class _Sharers(NamedTuple):
    """Those placed, one after the other, that begin with the same cached blocks."""

    hits: np.ndarray
    content: int
    """Of the last of the blocks."""
    slots: list[int]


class _Placed(NamedTuple):
    """Sequences that have a slot but do not stand in the arrays yet: int64 [sequences], booleans as 0 and 1."""

    slot: np.ndarray
    seq_id: np.ndarray
    num_tokens: np.ndarray
    num_cached: np.ndarray
    limit: np.ndarray
    parent: np.ndarray
    stops_at_eos: np.ndarray
    has_own_stops: np.ndarray
    has_first_token: np.ndarray


class Running:
    """Sequences that hold a slot: a place in arrays that are updated, never rebuilt, so that a decode step of
    hundreds of sequences costs a fixed number of array operations. Of a sequence in slot s

        0 ..... computed[s]            KV is there, or will be once the submitted steps have run
        0 ..... committed[s]           tokens are known
        0 ..... length[s]              tokens are known or being sampled by a submitted step
        0 ..... prefill_end[s]         tokens that were known when it was admitted; below this it is prefilling
        0 ..... limit[s]               it ends here at the latest
        0 ..... capacity[s]            there are blocks for the KV

    Who schedules or commits reads these arrays and may set one of them; what must change together, a method here does.

    Slots come and go as intp arrays, which index without being converted: at these sizes that is most of the time.
    """

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_model_len: int) -> None:
        self._blocks = blocks
        self.order = np.empty(0, np.intp)
        """Slots that are taken, in order of admission."""
        self.free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.num_prefilling = 0
        self.num_ended = 0

        def per_slot(dtype: type, value: int = 0) -> np.ndarray:
            return np.full(max_num_seqs, value, dtype)

        most_blocks = -(-max_model_len // blocks.block_size)
        self._token_blocks = np.empty((max_num_seqs, most_blocks, blocks.block_size), np.int32)
        self.tokens = self._token_blocks.reshape(max_num_seqs, -1)
        self._token_blocks = self._token_blocks.reshape(-1, blocks.block_size)
        self._width = most_blocks  # places of a slot's first block in it, and in the flat tables, are so far apart
        self.seq_ids = per_slot(np.int64, -1)
        self.computed = per_slot(np.int32)
        self.committed = per_slot(np.int32)
        self.length = per_slot(np.int32)
        self.prefill_end = per_slot(np.int32)
        self.limit = per_slot(np.int32)
        self.capacity = per_slot(np.int32)
        self.in_flight = per_slot(np.int32)
        """Submitted steps of the slot's sequence whose tokens have not been committed."""
        self.ended = per_slot(np.bool_)
        """Its sequence has ended, and keeps the slot until its last submitted step is committed."""
        self._aborted = per_slot(np.bool_)
        self.stops_at_eos = per_slot(np.bool_)
        self.has_own_stops = per_slot(np.bool_)
        self.has_first_token = per_slot(np.bool_)
        self._tables = np.full((max_num_seqs, most_blocks), blocks.num_blocks, np.intp)
        self._flat_tables = self._tables.reshape(-1)
        self._published = per_slot(np.intp)
        self._parent = per_slot(np.int64, ROOT)  # content number of the last published block, or CUT
        self._hashes: list[list[int]] = [[]] * max_num_seqs  # the sequences' prefix_hashes

        self._placed: list[int] = []  # fields of _Placed, one sequence after the other
        self._sharers: list[_Sharers] = []
        self._new_entries: list[TableEntries] = []  # for the next plan

    def sequence_in(self, slot: int) -> Sequence:
        seq = self.sequences[slot]
        assert seq is not None, f"slot {slot} is empty"
        return seq

    def table_of(self, slot: int) -> np.ndarray:
        """A running sequence's blocks."""
        return self._tables[slot, : self.capacity.item(slot) // self._blocks.block_size]

    # Taking a slot

    def num_unused(self, hits: np.ndarray) -> int:
        """How many of these cached blocks nobody uses: placing them takes so many."""
        if self._sharers and self._sharers[-1].hits is hits:
            return 0
        return self._blocks.num_unused(hits)

    def place(self, seq: Sequence, hits: np.ndarray, now_ns: int) -> int:
        """Give a waiting sequence a slot, which is returned, and the cached blocks `hits` to begin its table with.

        `settle` must follow, and does what can be done for many at once.
        """
        token_ids, num_cached, parent = seq.token_ids, 0, ROOT
        slot = self.free_slots.pop()
        self.sequences[slot] = seq
        self._hashes[slot] = seq.prefix_hashes
        self.tokens[slot, : len(token_ids)] = token_ids
        if len(hits):
            num_cached = len(hits) * self._blocks.block_size
            if not self._sharers or self._sharers[-1].hits is not hits:
                self._blocks.hit(seq.seq_id, hits)
                self._sharers.append(_Sharers(hits, self._blocks.content_of(hits[-1]), []))
            self._sharers[-1].slots.append(slot)
            parent = self._sharers[-1].content
        if seq.first_scheduled_ns is None:
            seq.first_scheduled_ns = now_ns
            seq.num_cached_tokens = num_cached
        has_own_stops = seq.stop_check is not None or bool(seq.stop_token_ids)
        stops_at_eos, has_first_token = not seq.sampling.ignore_eos, seq.first_token_ns is not None
        numbers = (slot, seq.seq_id, len(token_ids), num_cached, seq.limit, parent)
        self._placed += (*numbers, stops_at_eos, has_own_stops, has_first_token)
        return slot

    def settle(self) -> None:
        """Enter what has been placed since the last call, and take blocks for all of its tokens."""
        if not self._placed:
            return
        placed = _Placed(*np.array(self._placed, np.int64).reshape(-1, len(_Placed._fields)).T)
        self._placed.clear()
        slots, num_cached = placed.slot, placed.num_cached
        self.order = np.concatenate((self.order, slots))
        self.num_prefilling += len(slots)
        self.seq_ids[slots] = placed.seq_id
        self.computed[slots] = self.capacity[slots] = num_cached
        self.committed[slots] = self.length[slots] = self.prefill_end[slots] = placed.num_tokens
        self.limit[slots] = placed.limit
        self.in_flight[slots] = 0
        self.stops_at_eos[slots] = placed.stops_at_eos
        self.has_own_stops[slots] = placed.has_own_stops
        self.has_first_token[slots] = placed.has_first_token
        self._published[slots] = num_cached // self._blocks.block_size
        self._parent[slots] = placed.parent
        for sharers in self._sharers:
            self._enter_hits(sharers.hits, np.array(sharers.slots, np.intp))
        self._sharers.clear()
        self.grow(slots, -(-(placed.num_tokens - num_cached) // self._blocks.block_size))

    def _enter_hits(self, hits: np.ndarray, slots: np.ndarray) -> None:
        """They begin the tables of `slots`, of which the first is among their users."""
        if len(slots) > 1:
            self._blocks.hit(self.seq_ids[slots[1:]], hits)
        self._tables[slots, : len(hits)] = hits
        columns = np.tile(np.arange(len(hits)), len(slots))
        self._new_entries.append(TableEntries(slots.repeat(len(hits)), columns, np.tile(hits, len(slots))))

    # Growing

    def grow(self, slots: np.ndarray, counts: np.ndarray | None = None) -> None:
        """`counts` [slots] more blocks for each slot, or one more."""
        capacity, size = self.capacity[slots], self._blocks.block_size
        owners, columns = slots, (capacity // size).astype(np.intp)
        if counts is not None:
            owners, columns = _spread(slots, columns, counts)
        blocks = self._blocks.allocate(self.seq_ids[owners])
        self._flat_tables[owners * self._width + columns] = blocks
        self.capacity[slots] = capacity + (size if counts is None else size * counts)
        self._new_entries.append(TableEntries(owners, columns, blocks))

    def drain_table_entries(self) -> TableEntries:
        """The entries since the last call, in the order in which they were made, as int32."""
        entries = _joined(self._new_entries)
        self._new_entries.clear()
        return entries

    # Going on

    def advance(self, slots: np.ndarray, num_tokens: np.ndarray, num_decodes: int) -> tuple[np.ndarray, np.ndarray]:
        """A step that computes `num_tokens` [slots], decodes first, is being submitted.

        Returns where each slot starts, and whether it samples.
        """
        starts, length = self.computed[slots], self.length[slots]
        ends = starts + num_tokens
        samples = ends == length
        self.computed[slots] = ends
        self.length[slots] = length + samples
        self.in_flight[slots] += 1
        if num_decodes < len(slots):
            self.num_prefilling -= int(np.count_nonzero(samples[num_decodes:]))
        self._publish_full_blocks(slots)
        return starts, samples

    def leap(self, num_steps: int, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `num_steps` decode steps of all slots do, no more than a block has tokens, whose tokens are known.

        `token_ids` [slots in order of admission, steps] are the next ones to be committed. The caller has checked that
        empty blocks suffice and that nobody ends. Blocks are taken and published in the same order as step by step.
        Returns in which step, counted from 0, each slot takes its block and has one published, if it does.
        """
        slots, size = self.order, self._blocks.block_size
        computed, committed = self.computed[slots], self.committed[slots]
        room = self.capacity[slots] - computed
        need = np.argsort(room, kind="stable")[: np.count_nonzero(room < num_steps)]
        if len(need):
            self.grow(slots[need])
        self.tokens[slots[:, None], committed[:, None] + np.arange(num_steps)] = token_ids
        self.computed[slots] = computed + num_steps
        self.committed[slots] = committed + num_steps
        self.length[slots] += num_steps
        known = np.minimum(computed, committed - 1)  # a step is scheduled before the one before it is committed
        full = self._num_full(known + num_steps)
        full_in = full * size - known - 1
        if self._blocks.prefix_caching:
            due = (full > self._published[slots]).nonzero()[0]
            due = due[full_in[due].argsort(kind="stable")]
            if len(due):
                self._publish(slots[due], full[due])
        return room, full_in

    def _publish_full_blocks(self, slots: np.ndarray) -> None:
        """Tell the prefix index of the slots' blocks that are full once the submitted steps have run.

        A later plan may hit them, and runs after these.
        """
        if not self._blocks.prefix_caching:
            return
        full = self._num_full(self._known(slots))
        due = (full > self._published[slots]).nonzero()[0]
        if len(due):
            self._publish(slots[due], full[due])

    def _known(self, slots: np.ndarray) -> np.ndarray:
        """Each slot's tokens that are known and have their KV once the submitted steps have run."""
        return np.minimum(self.computed[slots], self.committed[slots])

    def _num_full(self, num_known: np.ndarray) -> np.ndarray:
        """Blocks that so many tokens fill and that may be offered for reuse."""
        full, longest = num_known // self._blocks.block_size, self._blocks.longest_prefix
        return full if longest is None else np.minimum(full, longest)

    def _publish(self, slots: np.ndarray, full: np.ndarray) -> None:
        """Offer the slots' first `full` [slots] blocks for reuse, as far as that has not been done."""
        first = self._published[slots]
        self._published[slots] = full
        parents = self._parent[slots]
        goes_on = parents != CUT
        if np.count_nonzero(goes_on) < len(slots):
            slots, first, full, parents = slots[goes_on], first[goes_on], full[goes_on], parents[goes_on]
        counts = full - first
        owners, columns = _spread(slots, first, counts)
        places = owners * self._width + columns
        tokens = self._token_blocks[places]
        hashes = self._hashes_of(slots, first, full, tokens)
        runs = PublishRuns(self.seq_ids[slots], parents, counts)
        self._parent[slots] = self._blocks.publish(runs, self._flat_tables[places], hashes, tokens)

    def _hashes_of(self, slots: np.ndarray, first: np.ndarray, full: np.ndarray, tokens: np.ndarray) -> list[int]:
        """Chained hashes of each slot's blocks from `first` to `full`, which hold `tokens`."""
        chains, data = [self._hashes[slot] for slot in slots.tolist()], tokens.tobytes()
        starts = first.tolist()
        if len(tokens) == len(chains) and [len(chain) for chain in chains] == starts:  # as in a decode step
            return self._blocks.next_hashes(chains, data)
        hashes: list[int] = []
        width = tokens.itemsize * self._blocks.block_size
        at = 0  # of the slot's first block in `data`
        for chain, start, end in zip(chains, starts, full.tolist(), strict=True):
            past = at + (end - start) * width
            if len(chain) < end:
                self._blocks.extend_hashes(chain, data[at + (len(chain) - start) * width : past])
            hashes += chain[start:end]
            at = past
        return hashes

    # Leaving

    def end(self, slots: np.ndarray, reasons: list[str]) -> list[Ended]:
        """Sequences have ended; `release_ended` follows now, or when the last submitted step of each is committed."""
        self.ended[slots] = True
        self._aborted[slots] = [reason == "abort" for reason in reasons]
        self.num_ended += len(slots)
        ended: list[Ended] = []
        for slot, length, reason in zip(slots.tolist(), self.committed[slots].tolist(), reasons, strict=True):
            seq = self.sequence_in(slot)
            ended.append(Ended(seq, self.tokens[slot, seq.num_prompt_tokens : length].tolist(), reason))
        return ended

    def release_ended(self, slots: np.ndarray) -> None:
        """Those of the slots whose sequence has ended, and whose submitted steps are all committed, are given back."""
        slots = slots[self.ended[slots] & (self.in_flight[slots] == 0)]
        if not len(slots):
            return
        self.ended[slots] = False
        self.num_ended -= len(slots)
        self.leave(slots, np.where(self._aborted[slots], _ABORTED, _FINISHED))

    def leave(self, slots: np.ndarray, reasons: np.ndarray) -> int:
        """Give back slots and their blocks, one after the other; returns how many blocks have no user left.

        `reasons` [slots] as REASON_CODES.
        """
        freed = self._free_blocks(slots, reasons)
        if self.num_prefilling:
            self.num_prefilling -= int(np.count_nonzero(self.computed[slots] < self.prefill_end[slots]))
        listed = slots.tolist()
        for slot in listed:
            self.sequences[slot] = None
        self.capacity[slots] = 0
        self.seq_ids[slots] = -1
        self.order = self.order[self.seq_ids[self.order] >= 0]
        self.free_slots += listed
        return freed

    def _free_blocks(self, slots: np.ndarray, reasons: np.ndarray) -> int:
        """What a sequence has not published yet is published just before its blocks are freed."""
        if not self._blocks.prefix_caching:
            return self._free_tables(slots, reasons)
        full = self._num_full(self._known(slots))
        due = (full > self._published[slots]).nonzero()[0].tolist()
        freed, first = 0, 0
        for end in [*due, len(slots)]:
            if first < end:
                freed += self._free_tables(slots[first:end], reasons[first:end])
            if end < len(slots):
                self._publish(slots[end : end + 1], full[end : end + 1])
            first = end
        return freed

    def _free_tables(self, slots: np.ndarray, reasons: np.ndarray) -> int:
        counts = self.capacity[slots] // self._blocks.block_size
        owners = slots.repeat(counts)
        columns = counts.cumsum().repeat(counts) - 1 - np.arange(len(owners))  # of each slot from last to first
        blocks = self._flat_tables[owners * self._width + columns]
        return self._blocks.free(self.seq_ids[owners], blocks, reasons.repeat(counts))


def _joined(entries: list[TableEntries]) -> TableEntries:
    if not entries:
        return TableEntries(_NOTHING, _NOTHING, _NOTHING)
    if len(entries) == 1:
        ((slots, columns, blocks),) = entries
        return TableEntries(slots.astype(np.int32), columns.astype(np.int32), blocks.astype(np.int32))
    return TableEntries(*(np.concatenate(parts, dtype=np.int32) for parts in zip(*entries, strict=True)))


def _spread(slots: np.ndarray, first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `counts` [slots] blocks from column `first` [slots] on, one slot after the other: the slot and the column."""
    if np.count_nonzero(counts == 1) == len(slots):  # as in a decode step
        return slots, first
    owners = slots.repeat(counts)
    return owners, np.arange(len(owners)) - (counts.cumsum() - counts - first).repeat(counts)
