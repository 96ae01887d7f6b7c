"""A recorder that holds every step to the engine's laws, and counts what the steps went through."""

from collections import Counter, deque
from itertools import chain

from nanovllm.engine.plan import Plan
from nanovllm.engine.scheduler import Scheduler
from nanovllm.events import COMMIT, EVICT, ArrivalEvent, BlockEvents, Recorder, RequestEvent, ScheduleEvent, StepEvent


class Laws(Recorder):
    """Raises AssertionError at the first event that breaks a law.

    `seen` counts what happened (preemptions, evictions, ...), so that a suite can show that its stress was real.
    """

    def __init__(self, scheduler: Scheduler, seen: Counter[str]) -> None:
        self.scheduler = scheduler
        self.blocks = scheduler.blocks
        self.seen = seen
        self.arrivals: dict[int, ArrivalEvent] = {}
        self.requests: dict[int, RequestEvent] = {}
        self.in_flight: deque[Plan] = deque()
        self.waiting_preempted: set[int] = set()
        self._displaced: list[set[int]] = []  # for each plan in flight, who has been preempted since
        self._num_scheduled = 0
        self._num_preemptions: Counter[int] = Counter()
        self._limits: dict[int, int] = {}
        self._first_scheduled_ns: dict[int, int] = {}
        self._first_token_ns: dict[int, int] = {}

    def on_arrival(self, event: ArrivalEvent) -> None:
        assert event.seq_id not in self.arrivals, f"seq_id={event.seq_id} arrives twice"
        self.arrivals[event.seq_id] = event

    def on_schedule(self, event: ScheduleEvent) -> None:
        plan = event.plan
        assert plan.step == self._num_scheduled, f"step {plan.step} after step {self._num_scheduled - 1}"
        self._num_scheduled += 1
        self._check_limits(event)
        tables = self._check_blocks(event.free_blocks, event.used_blocks)
        self._check_admissions(event)
        self._check_writes(plan, tables)
        for preemption in event.preemptions:
            self._num_preemptions[preemption.seq_id] += 1
            assert preemption.num_preemptions == self._num_preemptions[preemption.seq_id]
            self.waiting_preempted.add(preemption.seq_id)
            for displaced in self._displaced:
                displaced.add(preemption.seq_id)
        self._count_schedule(event)
        self.waiting_preempted.difference_update(a.seq_id for a in plan.admissions)
        self.in_flight.append(plan)
        self._displaced.append(set())

    def on_step(self, event: StepEvent) -> None:
        plan = self.in_flight.popleft()
        self._displaced.pop(0)
        assert event.schedule.plan is plan, f"step {event.schedule.plan.step} is committed before step {plan.step}"
        tables = self._check_blocks(event.free_blocks, event.used_blocks)
        assert event.cached_blocks <= event.free_blocks
        assert not (event.sampled & ~plan.samples).any(), "a row sampled that was not to sample"
        self._check_keeps_blocks_in_flight(tables)
        assert self.requests.keys() >= set(event.dropped_seq_ids), "a token of a living sequence was dropped"
        for seq_id in plan.seq_ids[event.sampled].tolist():
            if seq_id not in self._first_token_ns and seq_id not in self.requests:
                self._first_token_ns[seq_id] = event.end_ns
        self.seen["steps"] += 1
        self.seen["drops"] += len(event.dropped_seq_ids)
        dropped = set(event.dropped_seq_ids)
        self.seen["tokens kept of the preempted"] += sum(
            seq_id in self.waiting_preempted and seq_id not in dropped for seq_id in plan.seq_ids[plan.samples].tolist()
        )
        self._count_blocks(event.block_events)

    def on_request(self, event: RequestEvent) -> None:
        assert event.seq_id in self.arrivals, f"seq_id={event.seq_id} ends but never arrived"
        assert event.seq_id not in self.requests, f"seq_id={event.seq_id} ends twice"
        told = (event.num_preemptions, event.first_scheduled_ns, event.first_token_ns)
        seen = (
            self._num_preemptions[event.seq_id],
            self._first_scheduled_ns.get(event.seq_id),
            self._first_token_ns.get(event.seq_id),
        )
        assert told == seen, f"seq_id={event.seq_id}: preemptions, first scheduled, first token are {told}, not {seen}"
        self.requests[event.seq_id] = event
        self.waiting_preempted.discard(event.seq_id)
        self.seen[f"ends by {event.finish_reason}"] += 1

    def on_abort(self, step: int, block_events: BlockEvents) -> None:
        self._count_blocks(block_events)

    def seq_ids_in_flight(self) -> set[int]:
        return set(chain.from_iterable(plan.seq_ids.tolist() for plan in self.in_flight))

    def _check_limits(self, event: ScheduleEvent) -> None:
        plan, scheduler = event.plan, self.scheduler
        num_tokens = plan.num_tokens.tolist()
        assert min(num_tokens) > 0, "a row without work"
        assert sum(num_tokens) <= scheduler.max_num_batched_tokens, f"{sum(num_tokens)} tokens exceed the budget"
        assert event.num_running <= scheduler.max_num_seqs
        assert len(set(plan.seq_ids.tolist())) == len(set(plan.slots.tolist())) == plan.num_rows
        assert all(0 <= slot < scheduler.max_num_seqs for slot in plan.slots.tolist())
        assert sum(num_tokens[: plan.num_decodes]) == plan.num_decodes, "a decode is one token"
        assert sum(num_tokens[plan.num_decodes :]) == plan.num_prefill_tokens
        assert plan.samples[: plan.num_decodes].all(), "a decode samples"

    def _check_blocks(self, free_blocks: int, used_blocks: int) -> dict[int, list[int]]:
        tables = self.scheduler.live_tables()
        self.blocks.check_integrity(list(tables.values()))
        assert (free_blocks, used_blocks) == (self.blocks.num_free, self.blocks.num_used)
        assert free_blocks + used_blocks == self.blocks.num_blocks
        assert used_blocks == len(set(chain.from_iterable(tables.values())))
        return tables

    def _check_admissions(self, event: ScheduleEvent) -> None:
        """First come, first served; what an admitted row does not compute comes from the prefix cache."""
        live = self.scheduler.live_seq_ids()
        assert live == sorted(live), f"running, then waiting, are {live}: not in order of arrival"
        starts = dict(zip(event.plan.seq_ids.tolist(), event.plan.starts.tolist(), strict=True))
        for admission in event.plan.admissions:
            limit = self.scheduler.limit_of(
                len(self.arrivals[admission.seq_id].prompt_token_ids), admission.sampling.max_tokens
            )
            self._limits[admission.seq_id] = limit
            self._first_scheduled_ns.setdefault(admission.seq_id, event.start_ns)
        admitted = {admission.seq_id for admission in event.plan.admissions}
        for seq_id, cached in zip(event.plan.seq_ids.tolist(), event.cached_tokens.tolist(), strict=True):
            assert cached == (starts[seq_id] if seq_id in admitted else 0), f"seq_id={seq_id}: {cached} cached tokens"

    def _check_writes(self, plan: Plan, tables: dict[int, list[int]]) -> None:
        """Every row writes within its limit, into blocks that nobody else uses."""
        owners = Counter(chain.from_iterable(tables.values()))
        size = self.blocks.block_size
        for seq_id, start, count in zip(
            plan.seq_ids.tolist(), plan.starts.tolist(), plan.num_tokens.tolist(), strict=True
        ):
            assert start + count < self._limits[seq_id], f"seq_id={seq_id} runs beyond its limit"
            assert len(tables[seq_id]) * size >= start + count, f"seq_id={seq_id} has no block for its last token"
            for block in tables[seq_id][start // size : (start + count - 1) // size + 1]:
                assert owners[block] == 1, f"seq_id={seq_id} writes block {block}, which others use"

    def _check_keeps_blocks_in_flight(self, tables: dict[int, list[int]]) -> None:
        """Only a preemption takes the blocks of a sequence whose step is under way."""
        for plan, displaced in zip(self.in_flight, self._displaced, strict=True):
            gone = set(plan.seq_ids.tolist()) - displaced - tables.keys()
            assert not gone, f"seq_ids {gone} lost their blocks while step {plan.step} was under way"

    def _count_schedule(self, event: ScheduleEvent) -> None:
        seen, plan = self.seen, event.plan
        self._count_blocks(event.block_events)
        seen["preemptions"] += len(event.preemptions)
        seen["chunked prefills"] += plan.num_rows - int(plan.samples.sum())
        seen["mixed steps"] += plan.phase == "mixed"
        if self.in_flight and event.preemptions:
            busy = self.seq_ids_in_flight()
            seen["preemptions in flight"] += sum(p.seq_id in busy for p in event.preemptions)
        if plan.admissions:
            cached = dict(zip(plan.seq_ids.tolist(), event.cached_tokens.tolist(), strict=True))
            prompts = [self.arrivals[a.seq_id].prompt_token_ids.tobytes() for a in plan.admissions]
            seen["identical prompts in a step"] += len(prompts) - len(set(prompts))
            for admission in plan.admissions:
                hit, again = cached[admission.seq_id] > 0, self._num_preemptions[admission.seq_id] > 0
                seen["prefix hits"] += hit
                seen["re-admissions"] += again
                seen["prefix hits after preemption"] += hit and again

    def _count_blocks(self, events: BlockEvents) -> None:
        for event in events:
            if event.event == EVICT:
                self.seen["evictions"] += 1
            elif event.event == COMMIT:
                self.seen["published blocks"] += 1
