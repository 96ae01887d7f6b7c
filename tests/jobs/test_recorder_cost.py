"""What a step costs the step loop: python -m tests.jobs.test_recorder_cost measures it."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jobs.recorder import ParquetRecorder
from nanovllm.events import (
    ScheduleEvent,
    StepEvent,
)
from tests.jobs.recorder_events import decode_step


def measure_cost(*, num_steps: int = 2000, num_rows: int = 256, block_events: int = 16, rounds: int = 10) -> dict:
    """Microseconds of the step loop that the recording of a step takes.

    calls_us: in on_schedule and on_step. encode_us: CPU time of the encoding in the writer's thread, for which the
    step loop may have to wait because both need the interpreter. Writing the parts runs without the interpreter and
    is write_us of the other core. Each is the least of `rounds`: other programs can only add to it.
    """
    steps = [decode_step(step, num_rows=num_rows, block_events=block_events) for step in range(num_steps)]
    measured = [_measure_round(steps) for _ in range(rounds)]
    least = [round(min(column), 1) for column in zip(*measured, strict=True)]
    sizes = {"rows": num_rows, "block_events": block_events}
    return sizes | dict(zip(("calls_us", "encode_us", "write_us"), least, strict=True))


def _measure_round(steps: list[tuple[ScheduleEvent, StepEvent]]) -> tuple[float, ...]:
    """Microseconds a step of the calls, the encoding and the writing."""
    calls_ns = 0
    with tempfile.TemporaryDirectory() as run:
        recorder = ParquetRecorder.alone(Path(run))
        tables = recorder.tables
        add, encode, write = Stopwatch(tables.add), Stopwatch(tables.encode), Stopwatch(tables.write)
        tables.add, tables.encode, tables.write = add, encode, write
        for schedule, done in steps:
            start_ns = time.perf_counter_ns()
            recorder.on_schedule(schedule)
            recorder.on_step(done)
            calls_ns += time.perf_counter_ns() - start_ns
            sum(range(5000))  # the engine's own work
        recorder.close()
    totals_ns = (calls_ns, add.total_ns + encode.total_ns, write.total_ns)
    return tuple(total_ns / len(steps) / 1e3 for total_ns in totals_ns)


class Stopwatch:
    """Adds up the CPU time of a function in the thread that calls it."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self.total_ns = 0

    def __call__(self, *arguments: object) -> None:
        start_ns = time.thread_time_ns()
        self._function(*arguments)
        self.total_ns += time.thread_time_ns() - start_ns


def test_the_cost_can_be_measured():
    cost = measure_cost(num_steps=50, rounds=1)
    assert min(cost["calls_us"], cost["encode_us"], cost["write_us"]) > 0


if __name__ == "__main__":
    print(json.dumps(measure_cost()))
