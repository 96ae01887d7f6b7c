"""Who runs in a step, example by example."""

import numpy as np
import pytest

from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.plan import Plan
from nanovllm.engine.scheduler import Commit, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import ResolvedSampling


@pytest.fixture
def no_growth_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admit as long as the prompt fits: in a pool of a few blocks the reserve would let one sequence run alone."""
    monkeypatch.setattr(scheduler_module, "GROWTH_STEPS", 0)


class Steps:
    """Drives a scheduler by hand: schedules and commits, every sampled token being `token`."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=64,
            eos_token_ids=eos_token_ids,
        )
        self.num_sequences = 0
        self.num_steps = 0

    def add(self, prompt: list[int], max_tokens: int = 8) -> None:
        sampling = ResolvedSampling(max_tokens=max_tokens)
        self.scheduler.add(Sequence(self.num_sequences, np.array(prompt, np.int32), sampling, row=self.num_sequences))
        self.num_sequences += 1

    def schedule(self) -> Plan:
        scheduled = self.scheduler.schedule(self.num_steps)
        assert scheduled is not None
        self.num_steps += 1
        return scheduled.plan

    def commit(self, plan: Plan, token: int = 1) -> Commit:
        commit = self.scheduler.commit(plan, np.full(int(plan.samples.sum()), token, np.int32))
        self.blocks.check_integrity(list(self.scheduler.live_tables().values()))
        return commit

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.commit(self.schedule())


def rows(plan: Plan) -> dict[int, tuple[int, int]]:
    """Start and number of tokens of each sequence, in batch order."""
    return dict(
        zip(plan.seq_ids.tolist(), zip(plan.starts.tolist(), plan.num_tokens.tolist(), strict=True), strict=True)
    )


def test_nothing_to_do_is_no_plan() -> None:
    assert Steps().scheduler.schedule(0) is None


def test_prompts_are_prefilled_together_then_decoded_together() -> None:
    steps = Steps()
    steps.add([1, 2, 3])
    steps.add([4, 5])

    first = steps.schedule()
    steps.commit(first)
    second = steps.schedule()

    assert (first.phase, rows(first)) == ("prefill", {0: (0, 3), 1: (0, 2)})
    assert first.prefill_token_ids.tolist() == [1, 2, 3, 4, 5]
    assert (second.phase, rows(second)) == ("decode", {0: (3, 1), 1: (2, 1)})
    assert len(second.prefill_token_ids) == 0


def test_the_budget_goes_to_decodes_first_then_to_begun_prefills_then_to_newcomers() -> None:
    steps = Steps(max_num_seqs=4, max_num_batched_tokens=6)
    steps.add([1, 2])
    steps.run(1)
    steps.add(list(range(10, 17)))
    steps.add([7, 8])

    mixed, also_mixed = [], []
    for plans in (mixed, also_mixed):
        plan = steps.schedule()
        plans.append((plan.phase, plan.num_decodes, rows(plan), plan.samples.tolist()))
        steps.commit(plan)

    assert mixed == [("mixed", 1, {0: (2, 1), 1: (0, 5)}, [True, False])]
    assert also_mixed == [("mixed", 1, {0: (3, 1), 1: (5, 2), 2: (0, 2)}, [True, True, True])]


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_after_the_last() -> None:
    steps = Steps(max_num_seqs=2, max_num_batched_tokens=4)
    steps.add(list(range(10)))

    plans = []
    for _ in range(4):
        plans.append(steps.schedule())
        steps.commit(plans[-1])

    assert [rows(plan)[0] for plan in plans] == [(0, 4), (4, 4), (8, 2), (10, 1)]
    assert [plan.samples.tolist() for plan in plans] == [[False], [False], [True], [True]]
    assert np.concatenate([plan.prefill_token_ids for plan in plans]).tolist() == list(range(10))


def test_no_more_sequences_run_than_allowed() -> None:
    steps = Steps(max_num_seqs=2)
    for _ in range(3):
        steps.add([1, 2], max_tokens=2)

    assert list(rows(steps.schedule())) == [0, 1]
    assert steps.scheduler.num_waiting == 1


def test_a_newcomer_waits_while_the_running_ones_may_need_the_blocks() -> None:
    """The reserve: 16 more tokens for each running sequence, here 4 blocks."""
    steps = Steps(num_blocks=6)
    steps.add([1, 2, 3])
    steps.add([4, 5, 6])  # one block used, one asked for, four in reserve
    steps.add([7, 8, 9])

    assert list(rows(steps.schedule())) == [0, 1]


def test_identical_prompts_in_one_step_are_each_computed() -> None:
    """The first one's KV is not there yet when the second one is admitted."""
    steps = Steps()
    prompt = list(range(9))
    steps.add(prompt)
    steps.add(prompt)
    first = steps.schedule()
    steps.add(prompt)
    second = steps.schedule()

    assert rows(first) == {0: (0, 9), 1: (0, 9)}
    assert rows(second)[2] == (8, 1), "in the step after it, whole blocks are hit"


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8)])
def test_a_hit_takes_whole_blocks_and_leaves_at_least_the_last_token(length: int, cached: int) -> None:
    steps = Steps()
    steps.add(list(range(length)))
    steps.run(1)
    steps.add(list(range(length)))

    plan = steps.schedule()

    assert rows(plan)[1] == (cached, length - cached)


def test_a_table_update_names_each_new_block_once_and_in_order() -> None:
    steps = Steps(block_size=2)
    steps.add([1, 2, 3, 4])

    updates = []
    for _ in range(3):
        plan = steps.schedule()
        updates.append(list(zip(plan.table_columns.tolist(), plan.table_blocks.tolist(), strict=True)))
        steps.commit(plan)

    assert updates == [[(0, 0), (1, 1)], [(2, 2)], []]


@pytest.mark.usefixtures("no_growth_reserve")
def test_preemption_takes_the_youngest_and_puts_it_first_in_the_queue() -> None:
    steps = Steps(num_blocks=4, block_size=2, max_num_seqs=2)
    for first_token in (10, 20, 30):
        steps.add([first_token, first_token + 1, first_token + 2], max_tokens=5)
    steps.run(2)  # both running sequences have filled their two blocks

    scheduled = steps.scheduler.schedule(2)

    assert scheduled is not None
    assert rows(scheduled.plan) == {0: (4, 1)}
    (preemption,) = scheduled.preemptions
    assert (preemption.seq_id, preemption.freed_blocks, preemption.free_blocks) == (1, 2, 2)
    assert steps.scheduler.live_seq_ids() == [0, 1, 2], "it stands before the one that never ran"


@pytest.mark.usefixtures("no_growth_reserve")
def test_a_preempted_sequence_is_computed_anew_from_prompt_and_output() -> None:
    steps = Steps(num_blocks=4, block_size=2, max_num_seqs=2)
    steps.add([10, 11, 12], max_tokens=3)
    steps.add([20, 21, 22], max_tokens=3)
    steps.run(2)
    steps.run(1)  # preempts the second; the first one ends here

    plan = steps.schedule()

    assert [admission.seq_id for admission in plan.admissions] == [1]
    assert rows(plan) == {1: (2, 3)}, "the first of its blocks is still in the prefix cache"
    assert plan.prefill_token_ids.tolist() == [22, 1, 1]
    assert len(steps.commit(plan).ended[0].token_ids) == 3


def test_the_last_token_ends_a_sequence_and_frees_its_blocks() -> None:
    steps = Steps()
    steps.add([1, 2, 3], max_tokens=2)
    steps.run(1)

    (ended,) = steps.commit(steps.schedule(), token=5).ended

    assert (ended.token_ids, ended.reason) == ([1, 5], "max_tokens")
    assert steps.blocks.num_used == 0
    assert not steps.scheduler.has_unfinished()


def test_end_of_sequence_goes_before_the_limit() -> None:
    steps = Steps(eos_token_ids=(7,))
    steps.add([1, 2, 3], max_tokens=1)

    (ended,) = steps.commit(steps.schedule(), token=7).ended

    assert ended.reason == "eos"


def test_a_plan_may_be_scheduled_before_the_last_one_is_committed() -> None:
    steps = Steps()
    steps.add([1, 2, 3], max_tokens=2)

    first, second = steps.schedule(), steps.schedule()

    assert (rows(first), rows(second)) == ({0: (0, 3)}, {0: (3, 1)})
    assert steps.scheduler.schedule(2) is None, "the last token is being sampled"
    steps.commit(first)
    assert [ended.reason for ended in steps.commit(second).ended] == ["max_tokens"]


def test_a_token_behind_the_end_is_dropped_and_the_blocks_are_freed_with_it() -> None:
    steps = Steps(eos_token_ids=(7,))
    steps.add([1, 2, 3])
    first, second = steps.schedule(), steps.schedule()

    ended = steps.commit(first, token=7)
    assert ([e.token_ids for e in ended.ended], ended.dropped_seq_ids) == ([[7]], ())
    assert steps.blocks.num_used == 1, "the second step still writes there"

    dropped = steps.commit(second, token=9)
    assert (dropped.ended, dropped.dropped_seq_ids) == ([], (0,))
    assert steps.blocks.num_used == 0


@pytest.mark.usefixtures("no_growth_reserve")
def test_the_token_of_a_sequence_preempted_in_flight_is_kept() -> None:
    steps = Steps(num_blocks=4, block_size=2, max_num_seqs=2)
    steps.add([10, 11, 12], max_tokens=5)
    steps.add([20, 21, 22], max_tokens=5)
    steps.run(1)
    under_way = steps.schedule()
    preempting = steps.schedule()
    assert (list(rows(under_way)), list(rows(preempting))) == ([0, 1], [0])
    waiting = steps.scheduler.waiting[0]

    commit = steps.commit(under_way, token=5)

    assert commit.dropped_seq_ids == ()
    assert waiting.token_ids.tolist() == [20, 21, 22, 1, 5]


def test_sequences_about_to_end_are_waited_for_instead_of_preempting() -> None:
    steps = Steps(num_blocks=5, block_size=2, max_num_seqs=2)
    scheduler = steps.scheduler
    steps.blocks.allocate(np.array([99]))  # somebody else's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "GROWTH_STEPS", 0)
        steps.add([10, 11, 12], max_tokens=2)
        steps.add([20, 21, 22])
        first, second = steps.schedule(), steps.schedule()

    assert list(rows(second)) == [0, 1]
    assert scheduler.schedule(2) is None, "the first one's blocks come back with the step under way"
    scheduler.commit(first, np.array([1, 1], np.int32))
    scheduler.commit(second, np.array([1, 1], np.int32))
    third = scheduler.schedule(2)
    assert third is not None
    assert (rows(third.plan), third.preemptions) == ({1: (4, 1)}, ())


def test_an_abort_reaches_a_sequence_wherever_it_is() -> None:
    steps = Steps(max_num_seqs=2)
    for _ in range(3):
        steps.add([1, 2, 3])
    steps.run(2)

    waiting, running = steps.scheduler.abort(2), steps.scheduler.abort(0)

    assert waiting is not None
    assert running is not None
    assert (waiting.token_ids, running.token_ids) == ([], [1, 1])
    assert steps.scheduler.abort(0) is None, "it has already ended"
    assert steps.scheduler.live_seq_ids() == [1]
    steps.run(1)


def test_a_result_of_the_wrong_length_is_refused() -> None:
    steps = Steps()
    steps.add([1, 2, 3])

    with pytest.raises(AssertionError, match="1 rows sample but 2 tokens came back"):
        steps.scheduler.commit(steps.schedule(), np.array([1, 2], np.int32))
