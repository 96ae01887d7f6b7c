"""Random traces: a small pool, many sequences, and everything that may happen to them, all from one seed."""

import random
from collections import Counter
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import CUT, BlockManager
from nanovllm.engine.llm_engine import LLMEngine, SequenceOutput
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import PromptError
from nanovllm.sampling_params import ResolvedSampling
from tests.engine.laws import Laws
from tests.engine.ledger_check import LedgerCheck
from tests.engine.shadow import VOCAB_SIZE, ShadowRunner, reference_output

MOST_STEPS = 2000
"""A trace takes some twenty steps; one that takes so many goes round in circles."""
FINISH_REASONS = {"eos": "stop", "stop": "stop", "max_tokens": "length", "error": "error"}


class AbortingEngine(LLMEngine):
    """An engine that can give up one sequence between two steps, as `abort_all` gives up all of them."""

    def abort(self, seq_id: int) -> SequenceOutput | None:
        ended = self.scheduler.abort(seq_id)
        events = self._blocks.drain_events()
        for recorder in self.recorders:
            recorder.on_abort(self.last_committed, events)
        return None if ended is None else self._finish(ended)


class RepeatsAToken:
    """A stop check that needs every token once and in order: the sequence ends when two in a row are equal."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def __call__(self, token_id: int) -> bool:
        self.told.append(token_id)
        return len(self.told) > 1 and self.told[-1] == self.told[-2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    prompt: list[int]
    sampling: ResolvedSampling
    arrives_before_step: int
    bad_from: int | None = None
    has_stop_check: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One trace's world; `requests` are in order of arrival."""

    seed: int
    block_size: int
    num_blocks: int
    prefix_caching: bool
    lookahead: int
    deferred: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    growth_steps: int
    eos_token_ids: tuple[int, ...]
    abort_rate: float
    abort_all_before_step: int | None
    requests: tuple[Request, ...]

    def most_tokens(self, request: Request) -> int:
        """Prompt and output together, if it can be served."""
        max_tokens = request.sampling.max_tokens
        if max_tokens is None:  # the KV of the last token is never needed
            return min(self.max_model_len, self.num_blocks * self.block_size + 1)
        return min(self.max_model_len, len(request.prompt) + max_tokens)

    def refusal(self, request: Request) -> str | None:
        """Code of the PromptError that the request must meet with; None if it can be served."""
        num_prompt_tokens = len(request.prompt)
        if num_prompt_tokens == 0:
            return "empty_prompt"
        if num_prompt_tokens >= self.max_model_len:
            return "prompt_too_long"
        num_kv = max(num_prompt_tokens, self.most_tokens(request) - 1)
        return "exceeds_kv_cache" if num_kv > self.num_blocks * self.block_size else None

    def expected(self, request: Request) -> tuple[list[int], str]:
        """Tokens and finish reason."""
        tokens, reason = reference_output(
            request.prompt,
            request.sampling,
            most_tokens=self.most_tokens(request),
            eos_token_ids=self.eos_token_ids,
            stop_check=RepeatsAToken() if request.has_stop_check else None,
            bad_from=request.bad_from,
        )
        return tokens, FINISH_REASONS[reason]


def random_trace(seed: int) -> Trace:
    rng = random.Random(seed)
    block_size = rng.randint(1, 8)
    eos_token_ids = rng.choice(((), (7,), (7, 3)))
    requests = _random_requests(rng, block_size, eos_token_ids)
    sizes = [-(-(len(r.prompt) + (r.sampling.max_tokens or 1)) // block_size) for r in requests]
    tightness = rng.choice((0.8, 1.0, 1.2, 1.5, 2.0, 3.0))  # 0.8: the largest can never fit
    max_num_seqs = rng.choice((1, 2, 4, 6, 8))
    return Trace(
        seed=seed,
        block_size=block_size,
        num_blocks=max(1, int(max(sizes) * tightness)),
        prefix_caching=rng.random() < 0.85,
        lookahead=rng.choice((0, 1, 1, 2, 2)),
        deferred=rng.random() < 0.5,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice((0, 1, 3, 8, 24, 100)),
        max_model_len=rng.choice((24, 48, 48, 48)),
        growth_steps=rng.choice((0, 0, 0, 1, 16)),
        eos_token_ids=eos_token_ids,
        abort_rate=rng.choice((0.0, 0.0, 0.05, 0.2)),
        abort_all_before_step=rng.randint(0, 20) if rng.random() < 0.05 else None,
        requests=tuple(requests),
    )


def _random_requests(rng: random.Random, block_size: int, eos_token_ids: tuple[int, ...]) -> list[Request]:
    """Few tokens and a common beginning, so that prefixes meet; lengths at the edges of blocks."""
    alphabet = rng.choice((1, 2, 3, VOCAB_SIZE))
    common = [rng.randrange(alphabet) for _ in range(rng.randint(0, 20))]
    with_bad_rows = rng.random() < 0.15
    longest_output = rng.choice((4, 6, 10, 20))
    requests: list[Request] = []
    step = 0
    for _ in range(rng.randint(2, 8)):
        kind = rng.random()
        if kind < 0.15 and requests:
            prompt = rng.choice(requests).prompt
        elif kind < 0.25 and requests:  # the same but for its beginning
            earlier_prompt = rng.choice(requests).prompt
            changed = [rng.randrange(VOCAB_SIZE) for _ in range(min(block_size, len(earlier_prompt)))]
            prompt = changed + earlier_prompt[len(changed) :]
        elif kind < 0.4 and requests:  # goes on from what an earlier one answers
            earlier = rng.choice(requests)
            answer, _ = reference_output(
                earlier.prompt, earlier.sampling, most_tokens=len(earlier.prompt) + 8, eos_token_ids=eos_token_ids
            )
            prompt = earlier.prompt + answer + [rng.randrange(alphabet)]
        else:
            length = rng.randint(1, 4) * block_size + rng.choice((-1, 0, 1)) if kind < 0.8 else rng.randint(1, 24)
            prompt = common[: rng.randint(0, len(common))]
            prompt = (prompt + [rng.randrange(alphabet) for _ in range(length)])[: max(length, 0)]
        sampling = ResolvedSampling(
            max_tokens=None if rng.random() < 0.05 else rng.randint(1, longest_output),
            ignore_eos=rng.random() < 0.2,
            stop_token_ids=(rng.randrange(VOCAB_SIZE),) if rng.random() < 0.15 else (),
        )
        bad_from = len(prompt) + rng.randint(0, 6) if with_bad_rows and rng.random() < 0.4 else None
        requests += [
            Request(
                prompt=prompt,
                sampling=sampling,
                arrives_before_step=step,
                bad_from=bad_from,
                has_stop_check=rng.random() < 0.1,
            )
            for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))  # the same prompt, handed over in one go
        ]
        step += rng.choice((0, 0, 0, 1, 4))
    return requests


def run_trace(
    trace: Trace,
    seen: Counter[str],
    *,
    hash_bits: int = 64,
    with_ledger: bool = False,
) -> None:
    """Run one trace; raises AssertionError (or whatever the engine raises) where a law is broken.

    What happened is counted in `seen`. `with_ledger` replays the block events beside it.
    """
    with patch.object(scheduler_module, "GROWTH_STEPS", trace.growth_steps):
        _Run(trace, seen, hash_bits, with_ledger).run()


def run_traces(seeds: range, hash_bits: int = 64, with_ledger: bool = False) -> Counter[str]:
    """Run the traces of these seeds; returns what happened in them, a failure names its seed."""
    seen: Counter[str] = Counter(traces=len(seeds))
    for seed in seeds:
        try:
            run_trace(random_trace(seed), seen, hash_bits=hash_bits, with_ledger=with_ledger)
        except Exception as error:
            raise AssertionError(
                f"run_traces(range({seed}, {seed + 1}), {hash_bits}, {with_ledger}): {error!r}"
            ) from error
    return seen


class _Run:
    def __init__(
        self,
        trace: Trace,
        seen: Counter[str],
        hash_bits: int,
        with_ledger: bool,
    ) -> None:
        self.trace = trace
        self.seen = seen
        self.rng = random.Random(~trace.seed)
        self.blocks = BlockManager(
            trace.num_blocks, trace.block_size, prefix_caching=trace.prefix_caching, hash_bits=hash_bits
        )
        self._count_collisions()
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=trace.max_num_seqs,
            max_num_batched_tokens=trace.max_num_batched_tokens,
            max_model_len=trace.max_model_len,
            eos_token_ids=trace.eos_token_ids,
        )
        self.laws = Laws(self.scheduler, seen)
        runner = ShadowRunner(
            trace.block_size,
            lookahead=trace.lookahead,
            deferred=trace.deferred,
            bad_from={i: r.bad_from for i, r in enumerate(trace.requests) if r.bad_from is not None},
        )
        self.ledger = LedgerCheck(self.scheduler, runner, hash_bits) if with_ledger else None
        recorders = (self.laws,) if self.ledger is None else (self.laws, self.ledger)
        self.engine = AbortingEngine(self.scheduler, runner, recorders=recorders, clock=self._tick)
        self.now = 0
        self.outputs: dict[int, SequenceOutput] = {}
        self.request_of: dict[int, Request] = {}
        self.stop_checks: dict[int, RepeatsAToken] = {}

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def _count_collisions(self) -> None:
        publish, seen = self.blocks.publish, self.seen

        def counted(*args: object) -> np.ndarray:
            ends = publish(*args)
            seen["hash collisions"] += int(np.count_nonzero(ends == CUT))
            return ends

        self.blocks.publish = counted

    def run(self) -> None:
        engine, trace = self.engine, self.trace
        pending = list(enumerate(trace.requests))
        num_iterations = 0
        while pending or engine.has_work():
            while pending and pending[0][1].arrives_before_step <= num_iterations:
                self._add(*pending.pop(0))
            if trace.abort_rate:
                self._maybe_abort()
            if num_iterations == trace.abort_all_before_step:
                self._take(engine.abort_all())
                assert not engine.has_work(), "work is left after abort_all"
                self.seen["abort_all"] += 1
            self._take(engine.step())
            num_iterations += 1
            assert num_iterations < MOST_STEPS, "the trace does not end"
        self._check_end()

    def _add(self, row: int, request: Request) -> None:
        refusal, refused_with = self.trace.refusal(request), None
        stop_check = RepeatsAToken() if request.has_stop_check else None
        try:
            seq_id = self.engine.add(
                np.array(request.prompt, np.int32), request.sampling, row=row, stop_check=stop_check
            )
        except PromptError as error:
            refused_with = error.code
        assert refused_with == refusal, f"row {row}: refused with {refused_with}, expected {refusal}"
        if refusal is not None:
            self.seen["refusals"] += 1
            return
        self.request_of[seq_id] = request
        if stop_check is not None:
            self.stop_checks[seq_id] = stop_check

    def _maybe_abort(self) -> None:
        """Now and then give one up, most often in the rarest state: preempted with a step under way."""
        rng, preempted = self.rng, self.laws.waiting_preempted
        displaced = sorted(preempted & self.laws.seq_ids_in_flight()) if preempted else []
        if displaced and rng.random() < 0.3:
            self._abort(rng.choice(displaced))
        elif rng.random() < self.trace.abort_rate:
            live = self.scheduler.live_seq_ids()
            if live:
                self._abort(rng.choice(sorted(preempted) if preempted and rng.random() < 0.5 else live))

    def _abort(self, seq_id: int) -> None:
        preempted = seq_id in self.laws.waiting_preempted
        in_flight = seq_id in self.laws.seq_ids_in_flight()
        running = seq_id in self.scheduler.live_tables()
        self.seen["aborts in flight"] += in_flight
        self.seen["aborts while running"] += running
        self.seen["aborts while preempted"] += preempted
        self.seen["aborts while preempted and in flight"] += preempted and in_flight
        self.seen["aborts before running"] += not running and not preempted
        output = self.engine.abort(seq_id)
        assert output is not None, f"seq_id={seq_id} lives but cannot be aborted"
        self._take([output])

    def _take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            assert output.seq_id not in self.outputs, f"seq_id={output.seq_id} is answered twice"
            self.outputs[output.seq_id] = output

    def _check_end(self) -> None:
        assert self.blocks.num_free == self.blocks.num_blocks, "blocks are in use though nothing is left"
        assert not self.scheduler.live_tables()
        assert not self.laws.in_flight
        assert self.laws.arrivals.keys() == self.laws.requests.keys() == self.outputs.keys() == self.request_of.keys()
        if self.ledger is not None:
            self.ledger.check_end({i: r.prompt + self.outputs[i].token_ids for i, r in self.request_of.items()})
        for seq_id, request in self.request_of.items():
            output, event = self.outputs[seq_id], self.laws.requests[seq_id]
            tokens, finish_reason = self.trace.expected(request)
            if output.finish_reason == "aborted":
                assert output.token_ids == tokens[: len(output.token_ids)], f"seq_id={seq_id} was wrong when aborted"
                assert len(output.token_ids) < len(tokens) or finish_reason == "error"
            else:
                assert output.token_ids == tokens, f"seq_id={seq_id} gave {output.token_ids} instead of {tokens}"
                assert output.finish_reason == finish_reason
            assert event.num_output_tokens == len(output.token_ids)
            assert event.finish_reason == output.finish_reason
            assert event.num_cached_tokens == output.num_cached_tokens < len(request.prompt)
            assert output.num_prompt_tokens == event.num_prompt_tokens == len(request.prompt)
            assert event.arrived_ns <= (event.first_scheduled_ns or event.arrived_ns) <= event.finished_ns
            if seq_id in self.stop_checks:
                told = self.stop_checks[seq_id].told
                assert told == output.token_ids[: len(told)], f"the stop check of seq_id={seq_id} was told {told}"
                assert len(told) >= len(output.token_ids) - 1
            assert (event.first_token_ns is not None) == bool(output.token_ids)
