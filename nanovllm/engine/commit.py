"""What a step's tokens do: they go to their sequences, and end some of them."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.plan import Plan
from nanovllm.engine.running import Running
from nanovllm.engine.sequence import Ended, Sequence

_REASONS = ("error", "eos", "stop", "max_tokens")
_ERROR, _EOS, _STOP, _MAX_TOKENS = range(len(_REASONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a step's tokens did."""

    ended: list[Ended]
    dropped_seq_ids: tuple[int, ...]
    sampled: np.ndarray
    """bool [rows of the plan]"""


class Committer:
    """Gives sampled tokens to their sequences, which may have been preempted or have ended since the step's plan.

    The token of a displaced sequence, which was preempted with the step under way, is kept with it in the queue; that
    of a sequence that has ended is dropped.
    """

    def __init__(
        self,
        running: Running,
        waiting: deque[Sequence],
        displaced: dict[int, Sequence],
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._displaced = displaced
        self._eos_token_ids = eos_token_ids
        self._eos_tokens = [np.array(token_id, np.int32) for token_id in eos_token_ids]  # compared faster than ints

    def take(self, plan: Plan, token_ids: np.ndarray, now_ns: int) -> Commit:
        """Take a plan's sampled tokens (int32 [rows that sample], -1 where the logits were not finite)."""
        running = self._running
        rows = plan.samples.nonzero()[0]
        assert len(rows) == len(token_ids), f"{len(rows)} rows sample but {len(token_ids)} tokens came back"
        plan_slots = plan.slots.astype(np.intp)
        current = running.seq_ids[plan_slots] == plan.seq_ids
        slots, tokens, good = plan_slots[rows], token_ids, token_ids >= 0
        num_good = np.count_nonzero(good)
        ended: list[Ended] = []
        dropped: list[int] = []
        if not running.num_ended and np.count_nonzero(current) == len(current):
            running.in_flight[plan_slots] -= 1
        else:
            live = current[rows] & ~running.ended[slots]
            self._commit_displaced(plan, rows[~live], token_ids[~live], current, ended, dropped, now_ns)
            slots, tokens, good = slots[live], token_ids[live], good[live]
        if len(slots):
            self._append_tokens(slots, tokens, good, ended, now_ns)
        if running.num_ended:
            running.release_ended(plan_slots[current])
        sampled = plan.samples
        if num_good < len(rows):
            sampled = plan.samples.copy()
            sampled[rows] = token_ids >= 0
        return Commit(ended=ended, dropped_seq_ids=tuple(dropped), sampled=sampled)

    def _append_tokens(
        self, slots: np.ndarray, tokens: np.ndarray, good: np.ndarray, ended: list[Ended], now_ns: int
    ) -> None:
        """Tokens of sequences that still run; the ones that end with it go to `ended`."""
        running = self._running
        at = running.committed[slots]
        running.tokens[slots, at] = tokens  # a bad row's -1 stays outside of committed
        known = at + good
        running.committed[slots] = known
        eos = np.zeros(len(slots), np.bool_)
        for token in self._eos_tokens:
            eos |= tokens == token
        eos &= running.stops_at_eos[slots]
        stopped = self._own_stops(slots, tokens, good, eos)
        done = ((known >= running.limit[slots]) | eos | stopped | ~good).nonzero()[0]
        first = (good & ~running.has_first_token[slots]).nonzero()[0]
        if len(first):
            self._note_first_tokens(slots[first], now_ns)
        if len(done):
            reasons = np.where(eos[done], _EOS, np.where(stopped[done], _STOP, _MAX_TOKENS))
            reasons = np.where(good[done], reasons, _ERROR)
            ended += running.end(slots[done], [_REASONS[reason] for reason in reasons.tolist()])
            running.release_ended(slots[done])

    def _own_stops(self, slots: np.ndarray, tokens: np.ndarray, good: np.ndarray, eos: np.ndarray) -> np.ndarray:
        """Which rows end by a stop token or stop string of their own."""
        stopped = np.zeros(len(slots), np.bool_)
        own = self._running.has_own_stops[slots]
        if not np.count_nonzero(own):
            return stopped
        for i in np.flatnonzero(own & good & ~eos).tolist():
            seq = self._running.sequence_in(slots[i])
            stopped[i] = seq.stops_with(int(tokens[i]))
        return stopped

    def _note_first_tokens(self, slots: np.ndarray, now_ns: int) -> None:
        self._running.has_first_token[slots] = True
        for slot in slots.tolist():
            seq = self._running.sequence_in(slot)
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
        self._running.in_flight[plan.slots[current]] -= 1
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
        self._waiting.remove(seq)
        del self._displaced[seq.seq_id]
        ended.append(Ended(seq, seq.output_ids(), reason))
