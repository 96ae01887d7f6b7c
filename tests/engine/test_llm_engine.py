"""The step loop, example by example: refusals, look-ahead, rows that fail, giving up, and what recorders are told."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import PromptError
from nanovllm.events import StepEvent
from nanovllm.sampling_params import ResolvedSampling
from tests.engine.build import add, build_engine, drain
from tests.engine.shadow import VOCAB_SIZE, reference_output


def reference(prompt: list[int], max_tokens: int) -> list[int]:
    sampling = ResolvedSampling(max_tokens=max_tokens)
    return reference_output(prompt, sampling, most_tokens=len(prompt) + max_tokens)[0]


class ScriptedRunner:
    """Answers every row that samples with the next token of the script, at once."""

    lookahead = 0

    def __init__(self, *script: int) -> None:
        self.script = deque(script)
        self.results: deque[StepResult] = deque()

    def submit(self, plan: Plan) -> None:
        tokens = [self.script.popleft() for _ in range(int(plan.samples.sum()))]
        self.results.append(StepResult(token_ids=np.array(tokens, np.int32)))

    def collect(self) -> StepResult:
        return self.results.popleft()


# What can be served


@pytest.mark.parametrize("block_size", [1, 16, 64, 256])
@pytest.mark.parametrize("num_output_tokens", [1, 2, 5])
def test_a_sequence_that_fills_the_cache_to_the_last_slot_is_served(block_size: int, num_output_tokens: int) -> None:
    """The last token's KV is never needed: limit - 1 tokens must fit."""
    num_blocks = 8 if block_size == 1 else 2
    num_slots = num_blocks * block_size
    engine, _ = build_engine(
        num_blocks=num_blocks, block_size=block_size, max_model_len=1000, max_num_batched_tokens=100
    )
    prompt = [i % VOCAB_SIZE for i in range(num_slots + 1 - num_output_tokens)]

    seq_id = add(engine, prompt, max_tokens=num_output_tokens)

    assert drain(engine)[seq_id].token_ids == reference(prompt, num_output_tokens)
    with pytest.raises(PromptError, match="KV blocks") as refused:
        add(engine, prompt, max_tokens=num_output_tokens + 1)
    assert refused.value.code == "exceeds_kv_cache"


@pytest.mark.parametrize("block_size", [1, 16, 64, 256])
def test_without_max_tokens_a_prompt_gets_what_the_cache_holds(block_size: int) -> None:
    engine, _ = build_engine(num_blocks=2, block_size=block_size, max_model_len=1000)
    num_slots = 2 * block_size

    full = add(engine, [1] * num_slots, max_tokens=None)
    assert len(drain(engine)[full].token_ids) == 1
    with pytest.raises(PromptError) as refused:
        add(engine, [1] * (num_slots + 1), max_tokens=None)
    assert refused.value.code == "exceeds_kv_cache"
    assert "the cache has 2; raise kv.num_blocks" in str(refused.value)


def test_a_prompt_must_leave_room_for_one_token_below_the_models_length() -> None:
    engine, _ = build_engine(max_model_len=16)

    longest = add(engine, [1] * 15, max_tokens=9)
    assert len(drain(engine)[longest].token_ids) == 1
    for length in (16, 17):
        with pytest.raises(
            PromptError, match=f"has {length} tokens; with engine.max_model_len=16 at most 15"
        ) as refused:
            add(engine, [1] * length, max_tokens=1)
        assert refused.value.code == "prompt_too_long"


def test_an_empty_prompt_is_refused() -> None:
    engine, _ = build_engine()

    with pytest.raises(PromptError) as refused:
        add(engine, [])
    assert refused.value.code == "empty_prompt"


def test_a_refused_prompt_leaves_no_trace() -> None:
    engine, log = build_engine(num_blocks=1)

    with pytest.raises(PromptError):
        add(engine, [1] * 40)

    assert not engine.has_work()
    assert log.calls == []
    assert add(engine, [1]) == 0, "no seq_id is spent"


def test_ten_impossible_rows_of_a_thousand_do_not_hold_up_the_others() -> None:
    engine, _ = build_engine(num_blocks=12, max_num_batched_tokens=256, max_num_seqs=16)
    refused, wanted = 0, {}
    for row in range(1000):
        prompt = [row % 7, row % 5, row % 3]
        try:
            seq_id = add(engine, prompt * 20 if row % 100 == 50 else prompt, max_tokens=2, row=row)
        except PromptError:
            refused += 1
        else:
            wanted[seq_id] = reference(prompt, 2)

    outputs = drain(engine)

    assert refused == 10
    assert {seq_id: output.token_ids for seq_id, output in outputs.items()} == wanted


@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_prompt_sent_twice_gets_the_same_answer_at_every_edge_of_a_block(times: int, beyond: int) -> None:
    prompt = list(range(times * 4 + beyond))
    engine, _ = build_engine()

    cold = add(engine, prompt)
    cold_output = drain(engine)[cold]
    warm = add(engine, prompt)
    warm_output = drain(engine)[warm]

    assert cold_output.token_ids == warm_output.token_ids == reference(prompt, 4)
    assert (cold_output.num_cached_tokens, warm_output.num_cached_tokens) == (0, (len(prompt) - 1) // 4 * 4)


def test_a_caller_may_use_its_array_of_token_ids_again() -> None:
    engine, _ = build_engine()
    ids = np.arange(12, dtype=np.int32)
    for prompt in (list(range(12)), list(range(12)), list(range(20, 32))):
        ids[:] = prompt
        seq_id = engine.add(ids, ResolvedSampling(max_tokens=4), row=0)
        ids[:] = 0
        assert drain(engine)[seq_id].token_ids == reference(prompt, 4)


def test_token_ids_are_copied_if_they_can_change() -> None:
    ids = np.arange(12, dtype=np.int32)
    view = ids[2:]
    view.flags.writeable = False
    fixed = [np.frombuffer(ids.tobytes(), np.int32), ids.copy()]
    fixed[1].flags.writeable = False
    changing = bytearray(ids.tobytes())
    seen = np.frombuffer(memoryview(changing).toreadonly(), np.int32)
    for given in (ids, view, view[1:], seen, seen[2:], ids.astype(np.int64), *fixed, fixed[0][1:], fixed[1][3:]):
        own = Sequence(0, given, ResolvedSampling(max_tokens=4), row=0).token_ids
        assert own.dtype == np.int32
        assert own.tolist() == given.tolist()
        assert np.shares_memory(own, given) == any(given is each or given.base is each for each in fixed)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("num_output_tokens", range(1, 10))
def test_an_answer_can_be_reused_as_far_as_its_blocks_are_full(lookahead: int, num_output_tokens: int) -> None:
    """A conversation that goes on hits all of what it said, except the last token: its KV was never needed."""
    engine, _ = build_engine(lookahead=lookahead)
    prompt = [1, 2, 3]
    add(engine, prompt, max_tokens=num_output_tokens)
    said = prompt + drain(engine)[0].token_ids

    add(engine, [*said, 5, 6])

    assert drain(engine)[1].num_cached_tokens == (len(said) - 1) // 4 * 4


# Look-ahead


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_plans_are_submitted_as_far_ahead_as_the_runner_allows(lookahead: int) -> None:
    engine, log = build_engine(lookahead=lookahead)
    add(engine, [1, 2, 3], max_tokens=6)

    engine.step()

    assert log.calls == ["arrival 0", *[f"schedule {n}" for n in range(lookahead + 1)], "step 0"]
    assert engine.next_step == lookahead + 1


def test_a_token_behind_the_end_is_dropped_with_lookahead() -> None:
    prompt = [1, 2, 3]
    eos = reference(prompt, 2)[1]
    engine, log = build_engine(lookahead=1, eos_token_ids=(eos,))
    seq_id = add(engine, prompt, max_tokens=10)

    outputs = engine.step() + engine.step()

    assert [output.finish_reason for output in outputs] == ["stop"]
    assert outputs[0].token_ids[-1] == eos
    assert engine.has_work(), "a step is still under way"
    assert log.steps[-1].used_blocks > 0
    assert engine.step() == []
    assert log.steps[-1].dropped_seq_ids == (seq_id,)
    assert (log.steps[-1].used_blocks, engine.has_work()) == (0, False)


def test_has_work_until_the_last_step_is_committed() -> None:
    engine, _ = build_engine()
    assert not engine.has_work()
    assert engine.step() == []

    add(engine, [1], max_tokens=1)
    assert engine.has_work()
    engine.step()
    assert not engine.has_work()


# Rows that fail


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_row_whose_logits_are_not_finite_fails_alone(lookahead: int) -> None:
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    engine, log = build_engine(lookahead=lookahead, bad_from={1: 5})
    for row, prompt in enumerate(prompts):
        add(engine, prompt, max_tokens=6, row=row)

    outputs = drain(engine)

    assert [outputs[i].finish_reason for i in range(3)] == ["length", "error", "length"]
    assert outputs[1].token_ids == reference(prompts[1], 2), "the tokens before it stand"
    assert outputs[0].token_ids == reference(prompts[0], 6)
    assert outputs[2].token_ids == reference(prompts[2], 6)
    sampled = sum(int(step.sampled[step.schedule.plan.seq_ids == 1].sum()) for step in log.steps)
    dropped = sum(step.dropped_seq_ids.count(1) for step in log.steps)
    assert sampled - dropped == 2, "a row without a token in a later step has none to drop"


def test_a_scheduler_without_progress_is_an_error_that_says_so() -> None:
    engine, _ = build_engine(num_blocks=4)
    engine.scheduler.blocks.allocate(np.full(4, 99))  # as if blocks had leaked
    add(engine, [1, 2, 3])

    with pytest.raises(RuntimeError, match=r"no progress: .*0 sequences running, 1 waiting; 0 of 4 KV blocks free"):
        engine.step()


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("failing_call", range(1, 16))
def test_a_failing_allocation_is_fatal_and_loses_no_block(
    lookahead: int, failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is not swallowed, and giving up everything afterwards restores the pool, whichever call failed."""
    monkeypatch.setattr(scheduler_module, "GROWTH_STEPS", 0)
    engine, log = build_engine(num_blocks=7, block_size=2, max_num_seqs=3, lookahead=lookahead)
    blocks, num_calls = engine.scheduler.blocks, 0

    def failing(take: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal num_calls
            num_calls += 1
            if num_calls == failing_call:
                raise MemoryError(f"allocation {num_calls}")
            return take(*args)

        return call

    monkeypatch.setattr(blocks, "allocate", failing(blocks.allocate))
    for first in range(4):
        add(engine, [first, 1, 2], max_tokens=9)

    with pytest.raises(MemoryError, match=f"allocation {failing_call}"):
        drain(engine)
    engine.abort_all()

    assert blocks.num_free == 7
    blocks.check_integrity([])
    assert sorted(request.seq_id for request in log.requests) == [0, 1, 2, 3]


# Giving up


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_giving_up_answers_every_sequence_and_frees_every_block(lookahead: int, num_steps: int) -> None:
    engine, log = build_engine(lookahead=lookahead, max_num_seqs=2)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for prompt in prompts:
        add(engine, prompt, max_tokens=20)
    for _ in range(num_steps):
        engine.step()

    outputs = engine.abort_all()

    assert sorted(output.seq_id for output in outputs) == [0, 1, 2]
    assert {output.finish_reason for output in outputs} == {"aborted"}
    for output in outputs:
        assert output.token_ids == reference(prompts[output.seq_id], 20)[: len(output.token_ids)]
    committed = num_steps + (lookahead if num_steps else 0)
    assert max(len(output.token_ids) for output in outputs) == committed, "steps under way still count"
    assert not engine.has_work()
    assert engine.scheduler.blocks.num_used == 0
    assert log.calls[-4:] == [f"abort after {committed - 1}", "request 0", "request 1", "request 2"]
    assert engine.abort_all() == []


def test_an_engine_serves_on_after_giving_up() -> None:
    engine, log = build_engine(lookahead=1)
    add(engine, [1, 2, 3], max_tokens=20)
    engine.step()
    engine.abort_all()

    seq_id = add(engine, [1, 2, 3])

    assert drain(engine)[seq_id].token_ids == reference([1, 2, 3], 4)
    assert [step.schedule.plan.step for step in log.steps] == list(range(len(log.steps)))


# Ending


@pytest.mark.parametrize(
    ("sampling", "reason", "num_tokens"),
    [
        (ResolvedSampling(max_tokens=3), "stop", 2),
        (ResolvedSampling(max_tokens=2), "stop", 2),
        (ResolvedSampling(max_tokens=1), "length", 1),
        (ResolvedSampling(max_tokens=4, ignore_eos=True), "length", 4),
        (ResolvedSampling(max_tokens=4, ignore_eos=True, stop_token_ids=(6, 9)), "stop", 3),
        (ResolvedSampling(max_tokens=4, ignore_eos=True, stop_token_ids=(8,)), "stop", 2),
    ],
    ids=["eos", "eos at the limit", "limit before eos", "eos ignored", "own stop token", "eos as own stop token"],
)
def test_a_sequence_ends_at_the_first_reason(sampling: ResolvedSampling, reason: str, num_tokens: int) -> None:
    blocks = BlockManager(8, 4)
    scheduler = Scheduler(blocks, max_num_seqs=1, max_num_batched_tokens=8, max_model_len=32, eos_token_ids=(0, 8))
    engine = LLMEngine(scheduler, ScriptedRunner(5, 8, 9, 4))
    engine.add(np.array([1, 2], np.int32), sampling, row=0)

    (output,) = drain(engine).values()

    assert (output.finish_reason, output.token_ids) == (reason, [5, 8, 9, 4][:num_tokens])


def test_a_stop_check_is_told_of_each_token_once_through_preemption_and_lookahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_module, "GROWTH_STEPS", 0)
    engine, log = build_engine(num_blocks=6, block_size=2, max_num_seqs=3, lookahead=1)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    told: list[list[int]] = [[], [], []]

    def keep(row: int, token_id: int) -> bool:
        told[row].append(token_id)
        return False

    for row, prompt in enumerate(prompts):
        engine.add(
            np.array(prompt, np.int32),
            ResolvedSampling(max_tokens=8),
            row=row,
            stop_check=lambda token_id, row=row: keep(row, token_id),
        )
    drain(engine)

    assert sum(request.num_preemptions for request in log.requests) > 0
    assert told == [reference(prompt, 8) for prompt in prompts]


# What recorders are told


def test_outputs_do_not_depend_on_room_or_lookahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced preemption: the tight pool must really preempt, and nothing of it may show in the answers."""
    monkeypatch.setattr(scheduler_module, "GROWTH_STEPS", 0)
    prompts = [[row, row + 1, row + 2, row + 3] for row in range(6)]
    answers = []
    for num_blocks in (100, 7):
        for lookahead in (0, 1, 2):
            engine, log = build_engine(num_blocks=num_blocks, block_size=2, lookahead=lookahead)
            for prompt in prompts:
                add(engine, prompt, max_tokens=10)
            outputs = drain(engine)
            answers.append({i: (o.token_ids, o.finish_reason, o.num_prompt_tokens) for i, o in outputs.items()})
            assert (sum(r.num_preemptions for r in log.requests) > 0) == (num_blocks == 7)

    assert all(answer == answers[0] for answer in answers)


def comparable(step: StepEvent) -> tuple[object, ...]:
    plan = step.schedule.plan
    arrays = (plan.seq_ids, plan.slots, plan.starts, plan.num_tokens, plan.samples, plan.table_blocks, step.sampled)
    return (
        plan.step,
        plan.phase,
        *[array.tolist() for array in arrays],
        step.schedule.block_events,
        step.schedule.preemptions,
        step.block_events,
        step.finished,
        step.dropped_seq_ids,
        step.result.token_ids.tolist(),
        (step.schedule.start_ns, step.end_ns),
    )


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_same_requests_give_the_same_events(lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "GROWTH_STEPS", 0)
    runs = []
    for _ in range(2):
        engine, log = build_engine(num_blocks=8, block_size=2, lookahead=lookahead, eos_token_ids=(3,))
        for row in range(12):
            add(engine, [row % 4, 1, 2, row % 3], max_tokens=6)
        drain(engine)
        runs.append((log.calls, [comparable(step) for step in log.steps], log.requests))
        assert sum(len(step.schedule.preemptions) for step in log.steps) > 0

    assert runs[0] == runs[1]


def test_a_request_event_follows_the_step_that_ends_it() -> None:
    engine, log = build_engine()
    add(engine, [1, 2], max_tokens=1)
    add(engine, [3, 4], max_tokens=2)

    drain(engine)

    assert log.calls == [
        "arrival 0", "arrival 1", "schedule 0", "step 0", "request 0", "schedule 1", "step 1", "request 1",
    ]  # fmt: skip


def test_times_of_a_request_are_in_order() -> None:
    engine, log = build_engine(max_num_seqs=1)
    add(engine, [1, 2], max_tokens=3)
    add(engine, [1, 2], max_tokens=3)

    drain(engine)

    for request in log.requests:
        assert request.first_scheduled_ns is not None
        assert request.first_token_ns is not None
        assert request.arrived_ns < request.first_scheduled_ns < request.first_token_ns < request.finished_ns


def test_without_recorders_the_answers_are_the_same() -> None:
    engine, _ = build_engine()
    silent = LLMEngine(engine.scheduler, engine.runner)
    seq_id = add(silent, [1, 2, 3])

    assert drain(silent)[seq_id].token_ids == reference([1, 2, 3], 4)


def test_a_plan_belongs_to_its_step_for_good() -> None:
    """A recorder may keep a plan: nothing of it changes while later steps are scheduled."""
    engine, log = build_engine(lookahead=1)
    add(engine, [1, 2, 3, 4, 5], max_tokens=5)
    engine.step()
    plan = log.schedules[0].plan
    before = replace(
        plan, **{name: getattr(plan, name).copy() for name in ("starts", "num_tokens", "samples", "slots")}
    )

    drain(engine)

    for name in ("starts", "num_tokens", "samples", "slots"):
        assert getattr(plan, name).tolist() == getattr(before, name).tolist()


def test_an_engine_that_goes_on_counting_begins_with_the_numbers_it_is_given() -> None:
    engine, log = build_engine(first_step=7, first_seq_id=40)
    assert (engine.last_committed, engine.next_step, engine.next_seq_id) == (6, 7, 40)
    assert add(engine, [1, 2, 3]) == 40
    assert add(engine, [4, 5]) == 41
    drain(engine)
    steps = [event.schedule.plan.step for event in log.steps]
    assert steps == list(range(7, 7 + len(steps)))
    assert {int(seq_id) for event in log.steps for seq_id in event.schedule.plan.seq_ids} == {40, 41}
    assert (engine.last_committed, engine.next_seq_id) == (steps[-1], 42)
