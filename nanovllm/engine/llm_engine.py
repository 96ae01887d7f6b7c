"""The step loop: schedule, submit, collect, commit, and tell the recorders."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.event_log import by_step
from nanovllm.engine.plan import Plan, Runner, StepResult
from nanovllm.engine.scheduler import Commit, Ended, Scheduled, Scheduler
from nanovllm.engine.sequence import Sequence, StopCheck
from nanovllm.errors import PromptError
from nanovllm.events import ArrivalEvent, BlockEvents, Recorder, RequestEvent, ScheduleEvent, StepEvent
from nanovllm.sampling_params import ResolvedSampling

FINISH_REASONS = {"eos": "stop", "stop": "stop", "max_tokens": "length", "abort": "aborted", "error": "error"}


class SequenceOutput(NamedTuple):
    """A sequence that has ended."""

    seq_id: int
    row: int
    sample: int
    request_id: str
    token_ids: list[int]
    """Every sampled token, end-of-sequence and stop tokens included."""
    finish_reason: str
    """stop, length, error (its logits were not finite) or aborted"""
    stop: tuple[str, ...]
    """The sequence's stop strings; its text is cut before the first of them."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class _Submitted:
    plan: Plan
    schedule_ms: float
    event: ScheduleEvent | None
    """None where nobody listened when it was scheduled."""

    def later(self, num_steps: int) -> "_Submitted":
        """The same decodes so many steps later."""
        plan = replace(self.plan, step=self.plan.step + num_steps, starts=self.plan.starts + num_steps)
        return _Submitted(plan, self.schedule_ms, None if self.event is None else replace(self.event, plan=plan))


class LLMEngine:
    """Drives one runner. A plain object without global state; several may live in one process.

    `step()` keeps as many plans submitted as the runner's look-ahead allows, then waits for the oldest and commits
    its tokens. `clock` gives nanoseconds and is the only clock there is.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        recorders: Iterable[Recorder] = (),
        clock: Callable[[], int] = time.monotonic_ns,
        first_step: int = 0,
        first_seq_id: int = 0,
    ) -> None:
        """`first_step` and `first_seq_id`: where the numbers begin, for a job that goes on counting."""
        self.scheduler = scheduler
        self.runner = runner
        self.recorders = list(recorders)
        """Told of everything, in this order; more may join between two steps. A step is told to nobody if nobody was
        there when it was scheduled."""
        self.clock = clock
        self.next_step = first_step
        """The number that the next step to be scheduled gets."""
        self._blocks: BlockManager = scheduler.blocks
        self._in_flight: deque[_Submitted] = deque()
        self.next_seq_id = first_seq_id
        """The number that the next sequence gets."""
        self.last_committed = first_step - 1
        """The latest step whose tokens are known."""
        self._failure: BaseException | None = None

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    def describe(self) -> str:
        """What the engine is at, in words; for when it hangs, so it may be called from another thread."""
        blocks = self._blocks
        return (
            f"the next step is {self.next_step}, the last committed one {self.last_committed}, {len(self._in_flight)} "
            f"under way; {self.scheduler.num_running} sequences running, {self.num_waiting} waiting; "
            f"{blocks.num_free} of {blocks.num_blocks} KV blocks free"
        )

    def has_work(self) -> bool:
        """Whether anything is unfinished, or a submitted step has not been committed."""
        return bool(self._in_flight) or self.scheduler.has_unfinished()

    def check(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Raises PromptError for a prompt that can never be served, whatever else runs."""
        scheduler, blocks = self.scheduler, self._blocks
        limit = scheduler.limit_of(num_prompt_tokens, max_tokens)
        if 0 < num_prompt_tokens < limit <= scheduler.most_tokens:
            return
        if num_prompt_tokens == 0:
            raise PromptError("empty_prompt", "the prompt is empty; at least one token is needed")
        if num_prompt_tokens >= scheduler.max_model_len:
            raise PromptError(
                "prompt_too_long",
                f"the prompt has {num_prompt_tokens} tokens; with engine.max_model_len={scheduler.max_model_len} "
                f"at most {scheduler.max_model_len - 1} leave room for an output token",
            )
        limit = max(limit, num_prompt_tokens + 1)
        raise PromptError(
            "exceeds_kv_cache",
            f"prompt and output need {scheduler.blocks_for(limit)} KV blocks of {blocks.block_size} tokens for "
            f"{limit} tokens, but the cache has {blocks.num_blocks}; "
            "raise kv.num_blocks or kv.memory_fraction, or lower max_tokens",
        )

    def add(
        self,
        token_ids: np.ndarray,
        sampling: ResolvedSampling,
        *,
        row: int,
        sample: int = 0,
        request_id: str = "",
        stop_check: StopCheck | None = None,
    ) -> int:
        """Queue a prompt (int32 token ids) and return its seq_id; raises PromptError as `check` does."""
        self.check(len(token_ids), sampling.max_tokens)
        seq = Sequence(
            self.next_seq_id,
            token_ids,
            sampling,
            row=row,
            sample=sample,
            request_id=request_id,
            stop_check=stop_check,
            arrived_ns=self.clock(),
        )
        self.next_seq_id += 1
        self.scheduler.add(seq)
        if self.recorders:
            event = ArrivalEvent(
                seq_id=seq.seq_id, row=row, sample=sample, time_ns=seq.arrived_ns, prompt_token_ids=seq.token_ids
            )
            for recorder in self.recorders:
                recorder.on_arrival(event)
        return seq.seq_id

    def step(self) -> list[SequenceOutput]:
        """Go on until one more step is committed; returns the sequences that ended with it.

        What the runner raises comes through, and what interrupts the scheduler. The engine cannot go on after that:
        nobody knows what the device did, or which blocks are whose.
        """
        if self._failure is not None:
            raise RuntimeError(f"the engine failed in an earlier step ({self._failure}); build a new one")
        while len(self._in_flight) <= self.runner.lookahead and self._submit():
            pass
        if not self._in_flight:
            if self.scheduler.has_unfinished():
                raise RuntimeError(f"the scheduler makes no progress: {self.describe()}")
            return []
        return self._commit(self._in_flight.popleft())

    def longest_leap(self) -> int:
        """Steps that `leap` may take, if no token ends a sequence; 0 where a step has to be taken as it comes."""
        if len(self._in_flight) != self.runner.lookahead:
            return 0
        running = self.scheduler.running
        seq_ids = running.seq_ids[running.order]
        alike = all(
            plan.num_decodes == len(seq_ids) and np.array_equal(plan.seq_ids, seq_ids)
            for plan in (submitted.plan for submitted in self._in_flight)
        )
        return self.scheduler.longest_leap() if alike else 0

    def leap(
        self, num_steps: int, token_ids: np.ndarray, hear: Callable[[np.ndarray, BlockEvents], None] | None = None
    ) -> list[Plan]:
        """Take decode steps at once, as a simulation can that knows their tokens; runner and recorders are not told.

        `num_steps` is at most `longest_leap`, and `token_ids` (int32 [running sequences in order of admission, steps])
        end no sequence. Everything is then as if `step` had been called so often. Returns the plans that are under way
        instead of those which were. `hear` is given the steps of block events, and the events.
        """
        running = self.scheduler.running
        takes_in, publishes_in = running.leap(num_steps, token_ids)
        if hear is None:
            self._blocks.discard_events()
        else:
            seq_ids = running.seq_ids[running.order]
            steps, events = by_step(self._blocks.drain_events(), seq_ids, takes_in, publishes_in)
            hear(self.next_step + steps, events)
        self.next_step += num_steps
        self.last_committed += num_steps
        self._in_flight = deque(submitted.later(num_steps) for submitted in self._in_flight)
        return [submitted.plan for submitted in self._in_flight]

    def abort_all(self) -> list[SequenceOutput]:
        """Give up everything that is unfinished, after the steps under way; nothing is left to do then.

        After a failure of the runner too, without the steps under way.
        """
        outputs = []
        if self._failure is not None:
            self._in_flight.clear()
            self.scheduler.forget_submitted()
        while self._in_flight:
            outputs += self._commit(self._in_flight.popleft())
        ended = [self.scheduler.abort(seq_id) for seq_id in self.scheduler.live_seq_ids()]
        events = self._blocks.drain_events()
        for recorder in self.recorders:
            recorder.on_abort(self.last_committed, events)
        return outputs + [self._finish(e) for e in ended if e is not None]

    def _submit(self) -> bool:
        start_ns = self.clock()
        try:
            scheduled = self.scheduler.schedule(self.next_step, start_ns)
        except BaseException as error:  # such as KeyboardInterrupt, with blocks taken that no table has yet
            self._failure = error
            raise
        if scheduled is None:
            return False
        event = self._schedule_event(scheduled, start_ns) if self.recorders else None
        if event is None:
            self._blocks.discard_events()
        schedule_ms = (self.clock() - start_ns) / 1e6
        if event is not None:
            for recorder in self.recorders:
                recorder.on_schedule(event)
        self.next_step += 1
        try:
            self.runner.submit(scheduled.plan)
        except BaseException as error:
            self._failure = error
            raise
        self._in_flight.append(_Submitted(scheduled.plan, schedule_ms, event))
        return True

    def _commit(self, submitted: _Submitted) -> list[SequenceOutput]:
        try:
            result = self.runner.collect()
            end_ns = self.clock()
            commit = self.scheduler.commit(submitted.plan, result.token_ids, end_ns)
        except BaseException as error:
            self._failure = error
            raise
        self.last_committed = submitted.plan.step
        if submitted.event is None:
            self._blocks.discard_events()
        else:
            self._tell(submitted.event, submitted.schedule_ms, result, commit, end_ns)
        return [self._finish(ended) for ended in commit.ended]

    def _schedule_event(self, scheduled: Scheduled, start_ns: int) -> ScheduleEvent:
        return ScheduleEvent(
            plan=scheduled.plan,
            start_ns=start_ns,
            num_waiting=scheduled.num_waiting,
            num_running=scheduled.num_running,
            cached_tokens=scheduled.cached_tokens,
            preemptions=scheduled.preemptions,
            block_events=self._blocks.drain_events(),
            free_blocks=self._blocks.num_free,
            used_blocks=self._blocks.num_used,
        )

    def _tell(
        self, schedule: ScheduleEvent, schedule_ms: float, result: StepResult, commit: Commit, end_ns: int
    ) -> None:
        event = StepEvent(
            schedule=schedule,
            result=result,
            end_ns=end_ns,
            schedule_ms=schedule_ms,
            postprocess_ms=(self.clock() - end_ns) / 1e6,
            sampled=commit.sampled,
            finished=tuple(ended.fact() for ended in commit.ended),
            dropped_seq_ids=commit.dropped_seq_ids,
            block_events=self._blocks.drain_events(),
            free_blocks=self._blocks.num_free,
            used_blocks=self._blocks.num_used,
            cached_blocks=self._blocks.num_cached,
        )
        for recorder in self.recorders:
            recorder.on_step(event)

    def _finish(self, ended: Ended) -> SequenceOutput:
        seq = ended.sequence
        finish_reason = FINISH_REASONS[ended.reason]
        if self.recorders:
            event = RequestEvent(
                seq_id=seq.seq_id,
                row=seq.row,
                sample=seq.sample,
                request_id=seq.request_id,
                num_prompt_tokens=seq.num_prompt_tokens,
                num_cached_tokens=seq.num_cached_tokens,
                num_output_tokens=len(ended.token_ids),
                arrived_ns=seq.arrived_ns,
                first_scheduled_ns=seq.first_scheduled_ns,
                first_token_ns=seq.first_token_ns,
                finished_ns=self.clock(),
                num_preemptions=seq.num_preemptions,
                finish_reason=finish_reason,
            )
            for recorder in self.recorders:
                recorder.on_request(event)
        return SequenceOutput(
            seq.seq_id,
            seq.row,
            seq.sample,
            seq.request_id,
            ended.token_ids,
            finish_reason,
            seq.sampling.stop,
            seq.num_prompt_tokens,
            seq.num_cached_tokens,
            seq.num_preemptions,
        )
