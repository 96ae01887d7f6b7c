"""Runs the recorded rows through the real engine, with a runner that only knows what steps cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.ration import take_rows
from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.cost_model import CostModel
from jobs.simulation.cost_model_runner import CostModelRunner
from jobs.simulation.forward_cost import SharedReads
from jobs.simulation.recorded_rows import EOS, NONE, RecordedRows
from jobs.simulation.run_facts import RunFacts
from jobs.simulation.settings import Settings
from jobs.simulation.shared_reads import SharedReadsFinder
from jobs.simulation.step_sizes import Padding
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine, SequenceOutput
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import PromptError
from nanovllm.events import Recorder
from nanovllm.sampling_params import ResolvedSampling

LEAST_LEAP = 2
"""Steps that are taken at once."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a simulated run amounts to. Times are the simulated clock's."""

    settings: Settings
    num_steps: int = 0
    seconds: float = 0.0
    """From the first step's start to the last one's end."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Rows that this configuration cannot serve, by code."""
    num_shorter: int = 0
    """Rows that end before they did in the record, at engine.max_model_len."""
    latencies_s: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[rows that ended] from a row's arrival in the engine to its end."""
    most_rows: int = 0
    """Of a step."""
    most_tokens: int = 0
    """Of a step, padded."""
    shared: list[SharedReads] = field(default_factory=list)
    """Of each step, where the runner reads shared prefixes once."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache, as in a run's figures."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0


def simulate(
    facts: RunFacts,
    rows: RecordedRows,
    model: CostModel,
    settings: Settings,
    *,
    ledger: BlockLedger | None = None,
    recorders: Sequence[Recorder] = (),
) -> Outcome:
    """The rows as the generate job would feed them to an engine with these settings on the run's device.

    `ledger` takes the block events; `recorders` are told of every step, which takes three times as long. Without
    either, the cache keeps only what a row can find of another one's, as far as that surely comes to the same: that
    takes two thirds of the time or less.
    """
    if settings.prefix_caching and not (ledger or recorders):
        longest_prefix = rows.longest_shared // settings.block_size
        simulation = _Simulation(facts, rows, model, settings, longest_prefix=longest_prefix)
        if simulation.run():
            return simulation.outcome
    simulation = _Simulation(facts, rows, model, settings, ledger=ledger, recorders=recorders)
    simulation.run()
    return simulation.outcome


class _Simulation:
    def __init__(
        self,
        facts: RunFacts,
        rows: RecordedRows,
        model: CostModel,
        settings: Settings,
        *,
        longest_prefix: int | None = None,
        ledger: BlockLedger | None = None,
        recorders: Sequence[Recorder] = (),
    ) -> None:
        """`longest_prefix`: the blocks that any two rows' prompts have in common at most, and no more are cached."""
        prefix_caching = settings.prefix_caching and longest_prefix != 0
        finder = None
        if facts.reads_shared_prefixes_once and prefix_caching:
            finder = SharedReadsFinder(settings.max_num_seqs, settings.max_model_len, settings.block_size)
        self._runner = CostModelRunner(
            model,
            rows,
            Padding.of(facts, settings),
            lookahead=facts.lookahead,
            max_num_seqs=settings.max_num_seqs,
            finder=finder,
        )
        self._blocks = BlockManager(
            settings.num_blocks, settings.block_size, prefix_caching=prefix_caching, longest_prefix=longest_prefix
        )
        scheduler = Scheduler(
            self._blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            eos_token_ids=(EOS,),
        )
        self._ledger, self._may_leap = ledger, not recorders
        listeners = [*recorders, ledger] if ledger else recorders
        self._engine = LLMEngine(scheduler, self._runner, recorders=listeners, clock=self._runner.clock)
        self._model = model
        self._after_ms = model.after_ms(np.arange(settings.max_num_seqs + 1)).tolist()
        self._rows = rows
        self._by_time = facts.arrives_by_time
        self._next = 0
        # Rows of the input that never ran.
        self._num_failed_before = (np.diff(rows.row, prepend=-1).clip(1) - 1).tolist()
        self._samples = rows.sample.tolist()
        self._num_output_tokens = rows.num_output_tokens.tolist()
        self._samplings = _samplings(rows.max_tokens)
        self._arrived_ms: list[float] = []  # by seq_id
        self._latencies: list[float] = []
        self._tokens_in = 0
        self.outcome = Outcome(settings=settings)

    def run(self) -> bool:
        """Whether it came to its end, and not to where a cache without its longest prefixes could make a difference."""
        engine, runner = self._engine, self._runner
        end_ns = 0
        while True:
            self._feed()
            if not engine.has_work():
                if self._next == len(self._rows):
                    break
                runner.wait_until(self._rows.arrived_ns[self._next])
                continue
            self._leap()
            num_rows = engine.scheduler.num_running
            outputs = engine.step()
            end_ns = runner.clock()
            self._finish(outputs, runner.now_ms)
            if self._cache_may_matter():
                return False
            runner.spend(self._after_ms[num_rows] + (self._model.ending_ms(len(outputs)) if outputs else 0.0))
        outcome = self.outcome
        outcome.num_steps = engine.next_step
        outcome.seconds = end_ns / 1e9
        outcome.latencies_s = np.array(self._latencies)
        outcome.shared = runner.shared
        outcome.most_rows, outcome.most_tokens = runner.most_rows, runner.most_tokens
        return True

    def _cache_may_matter(self) -> bool:
        """A row that was preempted finds what it has left itself; what nobody finds may still displace something."""
        blocks = self._blocks
        if blocks.longest_prefix is None:
            return False
        may_evict = blocks.prefix_caching and blocks.num_taken > blocks.num_blocks
        return may_evict or self.outcome.num_preemptions > 0

    def _leap(self) -> None:
        """Steps in which nothing happens but that each row gets its next token are taken at once."""
        engine, runner, running = self._engine, self._runner, self._engine.scheduler.running
        if not self._may_leap:
            return
        if self._next < len(self._rows) and engine.num_waiting < self.outcome.settings.max_num_seqs:
            return  # rows may come in between
        num_steps = engine.longest_leap()
        if num_steps < LEAST_LEAP:
            return
        slots = running.order
        seq_ids, known = running.seq_ids[slots], running.committed[slots]
        num_steps = min(num_steps, runner.longest_leap(seq_ids, known))
        if num_steps < LEAST_LEAP:
            return
        rows, context = len(slots), int(running.computed[slots].sum()) + len(slots)
        hear = None if self._ledger is None else self._ledger.on_leap
        under_way = engine.leap(num_steps, runner.next_tokens(seq_ids, known, num_steps), hear)
        runner.leap(num_steps, rows, context, self._after_ms[rows], under_way)

    def _feed(self) -> None:
        if self._next == len(self._rows):
            return
        self._tokens_in = 0
        take_rows(self._engine, self._take)
        num_rows = self._engine.next_seq_id - len(self._arrived_ms)
        if not num_rows:
            return
        self._arrived_ms += [self._runner.now_ms] * num_rows
        self.outcome.num_prompt_tokens += self._tokens_in
        if self._engine.next_step:  # what came before the first step is not its time
            self._runner.spend(self._model.intake_ms(num_rows, self._tokens_in))

    def _take(self) -> int | None:
        """As GenerateLoop: a row that fails counts as one without tokens."""
        index, rows = self._next, self._rows
        if index == len(rows):
            return None
        if self._num_failed_before[index]:
            self._num_failed_before[index] -= 1
            return 0
        if self._by_time and rows.arrived_ns[index] > self._runner.clock():
            return None
        self._next += 1
        prompt = rows.prompt(index)
        try:
            seq_id = self._engine.add(prompt, self._samplings[index], row=index, sample=self._samples[index])
        except PromptError as error:
            self.outcome.refused[error.code] = self.outcome.refused.get(error.code, 0) + 1
            return 0
        if seq_id != index:  # rows before it have been refused
            self._runner.expect(seq_id, index)
        num_tokens = len(prompt)
        self._tokens_in += num_tokens
        return num_tokens

    def _finish(self, outputs: list[SequenceOutput], now_ms: float) -> None:
        outcome, latencies, arrived_ms = self.outcome, self._latencies, self._arrived_ms
        for output in outputs:
            num_tokens = len(output.token_ids)
            latencies.append((now_ms - arrived_ms[output.seq_id]) / 1e3)
            outcome.num_cached_tokens += output.num_cached_tokens
            outcome.num_output_tokens += num_tokens
            outcome.num_preemptions += output.num_preemptions
            outcome.num_shorter += num_tokens < self._num_output_tokens[output.row]


def _samplings(max_tokens: np.ndarray) -> list[ResolvedSampling]:
    """Of each row; equal ones are one object."""
    limits = max_tokens.tolist()
    made = {limit: ResolvedSampling(max_tokens=None if limit == NONE else limit) for limit in set(limits)}
    return [made[limit] for limit in limits]
