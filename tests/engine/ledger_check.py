"""A recorder that replays the ledger while the engine runs, and compares the two at every step."""

from collections import Counter

import xxhash

from nanovllm.engine.scheduler import Scheduler
from nanovllm.events import (
    ABORTED,
    COMMIT,
    FINISHED,
    FREE,
    HIT,
    PREEMPTED,
    RELEASE,
    ArrivalEvent,
    BlockEvent,
    BlockEvents,
    Recorder,
    RequestEvent,
    ScheduleEvent,
    StepEvent,
)
from tests.engine.ledger import Ledger, tables_at_steps
from tests.engine.shadow import ShadowRunner


class LedgerCheck(Recorder):
    """Raises AssertionError (or LedgerError) where block events and steps do not tell what the engine did."""

    def __init__(self, scheduler: Scheduler, runner: ShadowRunner, hash_bits: int = 64) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.hash_bits = hash_bits
        self.ledger = Ledger(scheduler.blocks.num_blocks)
        self.arrivals: dict[int, ArrivalEvent] = {}
        self.requests: dict[int, RequestEvent] = {}
        self.rows: list[tuple[int, BlockEvent]] = []
        """As the block_events table has them."""
        self.steps: dict[int, StepEvent] = {}
        self.published: dict[tuple[int, int], int] = {}
        """The hash that a sequence's block was published with, by seq_id and column."""
        self.first_cached: dict[int, int] = {}

    def on_arrival(self, event: ArrivalEvent) -> None:
        self.arrivals[event.seq_id] = event

    def on_schedule(self, event: ScheduleEvent) -> None:
        self._apply(event.plan.step, event.block_events)
        assert self.ledger.tables == _held(self.scheduler), f"step {event.plan.step}: the ledger has other tables"
        for admission in event.plan.admissions:
            row = event.plan.seq_ids.tolist().index(admission.seq_id)
            self.first_cached.setdefault(admission.seq_id, int(event.cached_tokens[row]))
        self._check_hits(event)
        preempted = {p.seq_id: p.freed_blocks for p in event.preemptions}
        freed = Counter(e.seq_id for e in event.block_events if e.event == FREE and e.reason == PREEMPTED)
        assert {seq_id: freed[seq_id] for seq_id in preempted} == preempted
        gone = {e.seq_id for e in event.block_events if e.event in (FREE, RELEASE)}
        assert gone == preempted.keys(), "scheduling takes blocks from preempted sequences only"

    def on_step(self, event: StepEvent) -> None:
        step = event.schedule.plan.step
        self._apply(step, event.block_events)
        assert self.ledger.tables == _held(self.scheduler), f"step {step}: the ledger has other tables"
        assert event.free_blocks == self.ledger.free_blocks
        assert event.cached_blocks == self.ledger.cached_blocks
        self.steps[step] = event

    def on_abort(self, step: int, block_events: BlockEvents) -> None:
        self._apply(step, block_events)
        assert self.ledger.tables == _held(self.scheduler), f"after step {step}: the ledger has other tables"

    def on_request(self, event: RequestEvent) -> None:
        self.requests[event.seq_id] = event

    def check_end(self, token_ids: dict[int, list[int]]) -> None:
        """The whole run is recorded; `token_ids` are prompt and output of each sequence."""
        assert not self.ledger.tables
        seq_ids = {step: event.schedule.plan.seq_ids.tolist() for step, event in self.steps.items()}
        assert list(seq_ids) == list(range(len(seq_ids))), "step numbers have gaps"
        assert tables_at_steps(seq_ids, self.rows) == self.runner.used_tables, (
            "the runner used other tables than the events give"
        )
        self._check_requests()
        self._check_hashes(token_ids)

    def _apply(self, step: int, events: BlockEvents) -> None:
        for event in events:
            self.ledger.apply(event)
            self.rows.append((step, event))
            if event.event == COMMIT:
                column = self.ledger.tables[event.seq_id].index(event.block_id)
                self.published[event.seq_id, column] = event.block_hash
            elif event.event == HIT:
                column = len(self.ledger.tables[event.seq_id]) - 1
                self.published[event.seq_id, column] = event.block_hash

    def _check_hits(self, event: ScheduleEvent) -> None:
        hits = Counter(e.seq_id for e in event.block_events if e.event == HIT)
        size = self.scheduler.blocks.block_size
        cached = dict(zip(event.plan.seq_ids.tolist(), event.cached_tokens.tolist(), strict=True))
        assert {s: n for s, n in cached.items() if n} == {s: n * size for s, n in hits.items()}

    def _check_requests(self) -> None:
        """What the three tables say of a sequence agrees."""
        tokens: Counter[int] = Counter()
        preemptions: Counter[int] = Counter()
        finished: dict[int, int] = {}
        for event in self.steps.values():
            tokens.update(event.schedule.plan.seq_ids[event.sampled].tolist())
            tokens.subtract(event.dropped_seq_ids)
            preemptions.update(p.seq_id for p in event.schedule.preemptions)
            finished |= {f.seq_id: f.num_output_tokens for f in event.finished}
        reasons = {e.seq_id: e.reason for _, e in self.rows if e.event in (FREE, RELEASE) and e.reason != PREEMPTED}
        for seq_id, request in self.requests.items():
            who, num_tokens = f"seq_id={seq_id}", request.num_output_tokens
            assert tokens[seq_id] == num_tokens, (
                f"{who}: {tokens[seq_id]} tokens sampled and kept, {num_tokens} put out"
            )
            assert preemptions[seq_id] == request.num_preemptions, f"{who} was preempted {preemptions[seq_id]} times"
            assert self.first_cached.get(seq_id, 0) == request.num_cached_tokens, f"{who}: other cached tokens at first"
            aborted = request.finish_reason == "aborted"
            assert (seq_id in finished) != aborted, f"{who}: a step finishes what is not aborted, and nothing else"
            assert finished.get(seq_id, num_tokens) == num_tokens, f"{who} finished with {finished[seq_id]} tokens"
            reason = reasons.get(seq_id)
            assert reason in (None, ABORTED if aborted else FINISHED), f"{who}: blocks given back because {reason}"

    def _check_hashes(self, token_ids: dict[int, list[int]]) -> None:
        """A block is published under the chained hash of the tokens that it really holds."""
        size = self.scheduler.blocks.block_size
        for (seq_id, column), block_hash in self.published.items():
            assert block_hash == chained_hash(token_ids[seq_id][: (column + 1) * size], size, self.hash_bits)


def chained_hash(token_ids: list[int], block_size: int, hash_bits: int = 64) -> int:
    """Of a prefix of whole blocks: each block's int32 tokens behind the hash of the blocks before it."""
    assert len(token_ids) % block_size == 0
    mask = (1 << hash_bits) - 1
    digest = 0
    for at in range(0, len(token_ids), block_size):
        tokens = b"".join(token.to_bytes(4, "little") for token in token_ids[at : at + block_size])
        digest = xxhash.xxh64_intdigest(digest.to_bytes(8, "little") + tokens) & mask
    return digest


def _held(scheduler: Scheduler) -> dict[int, list[int]]:
    return {seq_id: table for seq_id, table in scheduler.live_tables().items() if table}
