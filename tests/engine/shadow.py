"""A runner whose tokens are a hash of the KV that it reads through the block tables, and the sequential reference."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from nanovllm.engine.plan import Plan, StepResult
from nanovllm.engine.sequence import StopCheck
from nanovllm.sampling_params import ResolvedSampling

VOCAB_SIZE = 16
ENTRY = 4
"""Bytes of one position's KV: the hash of all tokens up to and including it."""


def _entry(token: int, state: int) -> int:
    return crc32(token.to_bytes(4, "little"), state)


def reference_output(
    prompt: list[int],
    sampling: ResolvedSampling,
    *,
    most_tokens: int,
    eos_token_ids: Collection[int] = (),
    stop_check: StopCheck | None = None,
    bad_from: int | None = None,
) -> tuple[list[int], str]:
    """Tokens and end reason of a sequence computed alone, one token at a time, without any cache.

    `most_tokens` bounds prompt and output together; once `bad_from` tokens are there, logits are not finite.
    """
    state = context = 0
    for token in prompt:
        state = _entry(token, state)
        context = crc32(state.to_bytes(ENTRY, "little"), context)
    output: list[int] = []
    while True:
        if bad_from is not None and len(prompt) + len(output) >= bad_from:
            return output, "error"
        token = context % VOCAB_SIZE
        output.append(token)
        if token in eos_token_ids and not sampling.ignore_eos:
            return output, "eos"
        if token in sampling.stop_token_ids or (stop_check is not None and stop_check(token)):
            return output, "stop"
        if len(prompt) + len(output) == most_tokens:
            return output, "max_tokens"
        state = _entry(token, state)
        context = crc32(state.to_bytes(ENTRY, "little"), context)


@dataclass(frozen=True, slots=True)
class _Step:
    """A plan as plain lists: nothing of the plan itself is read after it was submitted."""

    step: int
    seq_ids: list[int]
    slots: list[int]
    starts: list[int]
    inputs: list[list[int] | None]
    """None for a decode, whose input is the slot's last token."""
    samples: list[bool]
    admitted: list[tuple[int, int]]
    """slot, input row"""
    table_entries: list[tuple[int, int, int]]


class ShadowRunner:
    """Keeps one hash per KV slot and refuses what a device would do silently.

    A fresh block forgets what it held. A position is written once and in order, and is read only after the step that
    wrote it: all rows of a step read before any of them writes. So a wrong table entry, a stale block, a read before
    a write or a second writer is an AssertionError here, or a wrong token.

    A `deferred` runner keeps a submitted plan and runs it when it is collected, the latest moment there is.
    Rows of `bad_from` have logits that are not finite once they hold that many tokens.
    """

    def __init__(
        self,
        block_size: int,
        *,
        lookahead: int = 0,
        deferred: bool = False,
        bad_from: Mapping[int, int] | None = None,
    ) -> None:
        self.lookahead = lookahead
        self.deferred = deferred
        self.block_size = block_size
        self.bad_from = bad_from or {}
        self.used_tables: dict[int, dict[int, list[int]]] = {}
        """By step and seq_id, the whole block tables that were used."""
        self._kv: dict[int, bytearray] = {}
        self._tables: dict[int, list[int]] = {}
        self._num_hits: dict[int, int] = {}
        self._rows: dict[int, int] = {}
        self._last_tokens: dict[int, int] = {}
        self._submitted: deque[_Step] = deque()
        self._results: deque[StepResult] = deque()

    def submit(self, plan: Plan) -> None:
        assert len(self._submitted) + len(self._results) <= self.lookahead, "submitted beyond the look-ahead"
        step = _copy(plan)
        if self.deferred:
            self._submitted.append(step)
        else:
            self._results.append(self._run(step))

    def collect(self) -> StepResult:
        return self._run(self._submitted.popleft()) if self.deferred else self._results.popleft()

    def _run(self, step: _Step) -> StepResult:
        self._update_tables(step)
        self.used_tables[step.step] = {
            seq_id: list(self._tables[slot]) for seq_id, slot in zip(step.seq_ids, step.slots, strict=True)
        }
        contexts = [self._read(slot, start) for slot, start in zip(step.slots, step.starts, strict=True)]
        sampled: list[int] = []
        for row, slot in enumerate(step.slots):
            tokens = step.inputs[row]
            if tokens is None:
                tokens = [self._last_tokens[slot]]
            written = self._write(slot, step.starts[row], tokens, contexts[row])
            if step.samples[row]:
                num_tokens = step.starts[row] + len(tokens)
                bad = num_tokens >= self.bad_from.get(self._rows[slot], num_tokens + 1)
                token = -1 if bad else crc32(written, crc32(contexts[row])) % VOCAB_SIZE
                self._last_tokens[slot] = max(token, 0)
                sampled.append(token)
        return StepResult(token_ids=np.array(sampled, np.int32), padded_batch_size=len(step.slots))

    def _update_tables(self, step: _Step) -> None:
        starts = dict(zip(step.slots, step.starts, strict=True))
        for slot, row in step.admitted:
            self._tables[slot] = []
            self._rows[slot] = row
            assert starts[slot] % self.block_size == 0, "prefix hits are whole blocks"
            self._num_hits[slot] = starts[slot] // self.block_size
        for slot, column, block in step.table_entries:
            table = self._tables[slot]
            assert column == len(table), f"table entry {column} of slot {slot}, which has {len(table)}"
            table.append(block)
            if column >= self._num_hits[slot]:
                self._kv[block] = bytearray()

    def _read(self, slot: int, count: int) -> bytes:
        blocks = self._tables[slot][: -(-count // self.block_size)]
        context = b"".join([self._kv[block] for block in blocks])[: count * ENTRY]
        assert len(context) == count * ENTRY, f"slot {slot} reads KV that has not been written"
        return context

    def _write(self, slot: int, start: int, tokens: list[int], context: bytes) -> bytes:
        state = int.from_bytes(context[-ENTRY:], "little")
        table, size = self._tables[slot], self.block_size
        written = bytearray()
        for position, token in enumerate(tokens, start):
            state = _entry(token, state)
            entry = state.to_bytes(ENTRY, "little")
            block = self._kv[table[position // size]]
            assert len(block) == position % size * ENTRY, f"slot {slot} writes position {position} again or too early"
            block += entry
            written += entry
        return bytes(written)


def _copy(plan: Plan) -> _Step:
    inputs: list[list[int] | None] = [None] * plan.num_decodes
    ids, at = plan.prefill_token_ids.tolist(), 0
    for count in plan.num_tokens[plan.num_decodes :].tolist():
        inputs.append(ids[at : at + count])
        at += count
    assert at == len(ids), f"{len(ids)} prefill token ids for {at} prefill tokens"
    return _Step(
        step=plan.step,
        seq_ids=plan.seq_ids.tolist(),
        slots=plan.slots.tolist(),
        starts=plan.starts.tolist(),
        inputs=inputs,
        samples=plan.samples.tolist(),
        admitted=[(a.slot, a.row) for a in plan.admissions],
        table_entries=list(
            zip(plan.table_slots.tolist(), plan.table_columns.tolist(), plan.table_blocks.tolist(), strict=True)
        ),
    )
