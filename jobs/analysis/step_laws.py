"""Laws between the steps of one replica and attempt, its block events, and its requests."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.analysis.ledger import KIND
from jobs.analysis.lives import lives
from jobs.analysis.segments import Segment
from jobs.analysis.violation import Violation
from nanovllm.events import HIT


class StepLaws:
    """Each method yields what breaks its law first; a law that needs what a run lacks says nothing."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._ledger = segment.ledger
        self._step = segment.column("step")

    def violations(self) -> Iterator[Violation]:
        yield from self._counts()
        yield from self._halves()
        yield from self._pool_after_each_step()
        yield from self._contexts()
        yield from self._blocks_cover_contexts()
        yield from self._hits_are_cached_tokens()
        yield from self._requests()

    def _counts(self) -> Iterator[Violation]:
        """A step's numbers are the sums over its lists."""
        segment, flat = self.segment, self.segment.sequences
        count = segment.num_steps

        def total(amounts: np.ndarray) -> np.ndarray:
            return np.bincount(flat.step_row, amounts, count).astype(np.int64)

        tokens = segment.column("num_prefill_tokens") + segment.column("num_decode_tokens")
        yield from self._first("num_prefill_tokens + num_decode_tokens", tokens, total(flat.num_tokens))
        yield from self._first("num_cached_tokens", segment.column("num_cached_tokens"), total(flat.cached_tokens))
        yield from self._first("batch_size", segment.column("batch_size"), np.bincount(flat.step_row, minlength=count))
        for name in ("preempted", "finished"):
            at, _ = segment.id_lists(f"{name}_seq_ids")
            yield from self._first(f"num_{name}", segment.column(f"num_{name}"), np.bincount(at, minlength=count))
        twice = _repeats(flat.step_row, flat.seq_id)
        if len(twice):
            yield self._violation(
                "a sequence stands twice in one batch", flat.step_row[twice[0]], flat.seq_id[twice[0]]
            )

    def _halves(self) -> Iterator[Violation]:
        """Which steps run in halves is each version's own rule; of every version they are decode steps of several rows
        in a CUDA graph, on an engine that can."""
        segment = self.segment
        can = segment.column("cuda_graph") & (segment.column("num_prefill_tokens") == 0)
        can &= (segment.column("batch_size") > 1) & segment.attempt.engine.get("halves", True)
        wrong = np.flatnonzero(segment.in_halves & ~can)
        if len(wrong):
            yield self._violation("a step in halves cannot have run so", wrong[0], None)

    def _pool_after_each_step(self) -> Iterator[Violation]:
        """Free, used and cached blocks of a step are those of the ledger."""
        segment, ledger = self.segment, self._ledger
        if ledger is None:
            return
        free, used = segment.column("free_blocks"), segment.column("used_blocks")
        yield from self._first("free_blocks + used_blocks", free + used, np.full(len(free), ledger.num_blocks))
        last, checked = self._last_events()
        there = last >= 0
        for name, found, empty in (
            ("free_blocks", ledger.free_blocks, ledger.num_blocks),
            ("cached_blocks", ledger.cached_blocks, 0),
        ):
            expected = np.where(there, found[last] if len(found) else empty, empty)
            yield from self._first(name, segment.column(name)[checked], expected[checked])

    def _last_events(self) -> tuple[np.ndarray, slice]:
        """([steps] the last event before the step's row was made, or -1; the steps for which that can be known).

        It is the last one of the ends that came with this step, and of the schedulings that had begun by then: with
        look-ahead the next step's had. In a killed attempt that next step has no row that says when it was scheduled;
        one that failed gives up the steps under way, and what had ended already is freed after its last step's row.
        """
        segment, events = self.segment, self.segment.events
        starts, ends = segment.column("start_ns"), segment.column("end_ns")
        scheduled = np.searchsorted(starts, ends) - 1  # the last step whose scheduling began before this one's end
        is_whole = segment.attempt.is_sealed and not segment.attempt.has_failed
        lookahead = int((scheduled - np.arange(len(starts))).max(initial=0))
        checked = slice(0, len(starts) if is_whole else max(len(starts) - max(lookahead, 1), 0))
        before = np.arange(len(events))

        def last_of(chosen: np.ndarray, step: np.ndarray) -> np.ndarray:
            steps, places = events.step[chosen], before[chosen]
            order = np.argsort(steps, kind="stable")
            latest = np.maximum.accumulate(places[order]) if len(places) else places
            found = np.searchsorted(steps[order], step, side="right") - 1
            return np.where(found >= 0, latest[found] if len(latest) else -1, -1)

        by_scheduling = last_of(events.of_scheduling, self._step[scheduled] if len(starts) else self._step)
        return np.maximum(by_scheduling, last_of(events.of_ending, self._step)), checked

    def _contexts(self) -> Iterator[Violation]:
        """A sequence's context grows by its tokens and those from the cache; a preemption takes it back to nothing."""
        flat = self.segment.sequences
        found = lives(self.segment)
        order, begins = found.order, found.begins
        seq_id, step_row = flat.seq_id[order], flat.step_row[order]
        context = flat.context_len[order]
        before = np.zeros(len(order), np.int64)
        before[1:] = context[:-1]
        before[begins] = 0
        expected = before + flat.num_tokens[order] + flat.cached_tokens[order]
        wrong = np.flatnonzero(expected != context)
        wrong = wrong[np.argsort(step_row[wrong], kind="stable")]
        if len(wrong):
            i = wrong[0]
            detail = f"seq_context_lens is {context[i]}; the steps before give {expected[i]}"
            yield self._violation("a context does not go on from the last one", step_row[i], seq_id[i], detail)
        late = np.flatnonzero((flat.cached_tokens[order] > 0) & ~begins)
        if len(late):
            i = late[0]
            yield self._violation("a sequence takes cached tokens that has begun already", step_row[i], seq_id[i])

    def _blocks_cover_contexts(self) -> Iterator[Violation]:
        """The blocks that a sequence holds in a step have room for its context."""
        segment, flat, size = self.segment, self.segment.sequences, self.segment.block_size
        if self._ledger is None or size is None:
            return
        events = segment.events
        step = self._step[flat.step_row]
        preempting = events.of_scheduling & events.gives
        takes, gives = events.takes, events.gives & ~preempting
        held = _num_up_to(events.seq_id[takes], events.step[takes], flat.seq_id, step)
        held -= _num_up_to(events.seq_id[preempting], events.step[preempting], flat.seq_id, step)
        held -= _num_up_to(events.seq_id[gives], events.step[gives], flat.seq_id, step - 1)
        need = -(-flat.context_len // size)
        # In the middle of a prompt the blocks of its rest are there already.
        wrong = np.flatnonzero(np.where(flat.sampled, held != need, held < need))
        if len(wrong):
            i = wrong[0]
            detail = f"a context of {flat.context_len[i]} tokens needs {need[i]} blocks of {size}, it holds {held[i]}"
            yield self._violation("a block table does not fit its context", flat.step_row[i], flat.seq_id[i], detail)

    def _hits_are_cached_tokens(self) -> Iterator[Violation]:
        segment, flat, size = self.segment, self.segment.sequences, self.segment.block_size
        if self._ledger is None or size is None:
            return
        hits = segment.events.kind == KIND[HIT]
        seq_ids, steps = segment.events.seq_id[hits], segment.events.step[hits]
        step = self._step[flat.step_row]
        found = _num_up_to(seq_ids, steps, flat.seq_id, step) - _num_up_to(seq_ids, steps, flat.seq_id, step - 1)
        wrong = np.flatnonzero(found * size != flat.cached_tokens)
        if len(wrong):
            i = wrong[0]
            detail = f"{found[i]} blocks of {size} tokens were hit, seq_cached_tokens is {flat.cached_tokens[i]}"
            yield self._violation("cached tokens are not those of the hits", flat.step_row[i], flat.seq_id[i], detail)

    def _requests(self) -> Iterator[Violation]:
        """What a request says of itself is what its steps say."""
        segment, flat = self.segment, self.segment.sequences
        seq_ids = segment.request("seq_id")
        _, dropped = segment.id_lists("dropped_seq_ids")
        _, preempted = segment.id_lists("preempted_seq_ids")
        finished_at, finished = segment.id_lists("finished_seq_ids")
        kept = _counts(flat.seq_id[flat.sampled], seq_ids) - _counts(dropped, seq_ids)
        yield from self._of_request("num_output_tokens", kept, "tokens sampled minus tokens dropped are")
        yield from self._of_request("num_preemptions", _counts(preempted, seq_ids), "its steps preempt it, times:")
        first = _first_of(flat.seq_id, seq_ids)
        cached = np.where(first >= 0, flat.cached_tokens[first] if len(flat.seq_id) else 0, 0)
        yield from self._of_request("num_cached_tokens", cached, "its first step takes from the cache")
        reasons = np.array(segment.run.requests["finish_reason"].take(segment.request_rows).to_pylist(), object)
        ends = (reasons != "aborted").astype(np.int64)
        found = _counts(finished, seq_ids)
        wrong = np.flatnonzero(found != ends)
        if len(wrong):
            i = wrong[0]
            detail = f"finish_reason is {reasons[i]}, and {found[i]} steps finish it"
            yield self._of_sequence("a sequence does not end exactly once", seq_ids[i], detail)
        repeated = _repeats(np.zeros(len(finished), np.int64), finished)
        if len(repeated):
            i = repeated[0]
            yield self._violation("a sequence ends twice", finished_at[i], finished[i])

    def _of_request(self, name: str, expected: np.ndarray, because: str) -> Iterator[Violation]:
        found, seq_ids = self.segment.request(name), self.segment.request("seq_id")
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            i = wrong[0]
            yield self._of_sequence(f"a request's {name} differs", seq_ids[i], f"{found[i]}; {because} {expected[i]}")

    def _of_sequence(self, law: str, seq_id: Any, detail: str) -> Violation:
        """At the sequence's last step."""
        rows = self.segment.sequences.step_row[self.segment.sequences.seq_id == seq_id]
        return self._violation(law, rows[-1] if len(rows) else None, seq_id, detail)

    def _first(self, name: str, found: np.ndarray, expected: np.ndarray) -> Iterator[Violation]:
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            at = wrong[0]
            yield self._violation(f"{name} differs", at, None, f"{found[at]}; the records give {expected[at]}")

    def _violation(self, law: str, row: Any, seq_id: Any, detail: str = "") -> Violation:
        return Violation(
            law=law,
            detail=detail or "here",
            replica=self.segment.replica,
            attempt=self.segment.attempt.number,
            step=None if row is None else int(self._step[row]),
            seq_id=None if seq_id is None else int(seq_id),
        )


def _num_up_to(keys: np.ndarray, times: np.ndarray, key: np.ndarray, time: np.ndarray) -> np.ndarray:
    """For each (key, time): how many of (keys, times) have this key and a time not later."""
    if not len(keys):
        return np.zeros(len(key), np.int64)
    low = min(int(times.min()), int(time.min()) if len(time) else 0)
    width = max(int(times.max()), int(time.max()) if len(time) else 0) - low + 2
    sorted_keys = np.sort(keys * width + (times - low))
    return np.searchsorted(sorted_keys, key * width + (time - low), "right") - np.searchsorted(sorted_keys, key * width)


def _counts(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How often each wanted value is among the values."""
    ordered = np.sort(values)
    return np.searchsorted(ordered, wanted, "right") - np.searchsorted(ordered, wanted)


def _first_of(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands first; -1 where it does not."""
    unique, first = np.unique(values, return_index=True)
    at = np.searchsorted(unique, wanted)
    there = at < len(unique)
    there[there] = unique[at[there]] == wanted[there]
    result = np.full(len(wanted), -1, np.int64)
    result[there] = first[at[there]]
    return result


def _repeats(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Places of values that stand a second time in their group, the earliest group first."""
    order = np.lexsort((values, group))
    same = (group[order[1:]] == group[order[:-1]]) & (values[order[1:]] == values[order[:-1]])
    return order[1:][same]
