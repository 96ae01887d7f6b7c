"""A small engine over the shadow runner, and a recorder that keeps what it is told."""

from collections.abc import Mapping

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine, SequenceOutput
from nanovllm.engine.scheduler import Scheduler
from nanovllm.events import ArrivalEvent, BlockEvent, BlockEvents, Recorder, RequestEvent, ScheduleEvent, StepEvent
from nanovllm.sampling_params import ResolvedSampling
from tests.engine.shadow import ShadowRunner


class Log(Recorder):
    """Keeps every event."""

    def __init__(self) -> None:
        self.arrivals: list[ArrivalEvent] = []
        self.schedules: list[ScheduleEvent] = []
        self.steps: list[StepEvent] = []
        self.requests: list[RequestEvent] = []
        self.block_events: list[BlockEvent] = []
        self.calls: list[str] = []

    def on_arrival(self, event: ArrivalEvent) -> None:
        self.arrivals.append(event)
        self.calls.append(f"arrival {event.seq_id}")

    def on_schedule(self, event: ScheduleEvent) -> None:
        self.schedules.append(event)
        self.block_events += event.block_events
        self.calls.append(f"schedule {event.plan.step}")

    def on_step(self, event: StepEvent) -> None:
        self.steps.append(event)
        self.block_events += event.block_events
        self.calls.append(f"step {event.schedule.plan.step}")

    def on_request(self, event: RequestEvent) -> None:
        self.requests.append(event)
        self.calls.append(f"request {event.seq_id}")

    def on_abort(self, step: int, block_events: BlockEvents) -> None:
        self.block_events += block_events
        self.calls.append(f"abort after {step}")


def build_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    prefix_caching: bool = True,
    lookahead: int = 0,
    deferred: bool = True,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 64,
    eos_token_ids: tuple[int, ...] = (),
    bad_from: Mapping[int, int] | None = None,
    first_step: int = 0,
    first_seq_id: int = 0,
) -> tuple[LLMEngine, Log]:
    log = Log()
    scheduler = Scheduler(
        BlockManager(num_blocks, block_size, prefix_caching=prefix_caching),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
    )
    runner = ShadowRunner(block_size, lookahead=lookahead, deferred=deferred, bad_from=bad_from)
    ticks = iter(range(1, 10**9))
    engine = LLMEngine(
        scheduler,
        runner,
        recorders=(log,),
        clock=lambda: next(ticks),
        first_step=first_step,
        first_seq_id=first_seq_id,
    )
    return engine, log


def add(engine: LLMEngine, prompt: list[int], max_tokens: int | None = 4, row: int = 0) -> int:
    return engine.add(np.array(prompt, np.int32), ResolvedSampling(max_tokens=max_tokens), row=row)


def drain(engine: LLMEngine) -> dict[int, SequenceOutput]:
    """Step until nothing is left; outputs by seq_id."""
    outputs: dict[int, SequenceOutput] = {}
    while engine.has_work():
        outputs |= {output.seq_id: output for output in engine.step()}
    return outputs
