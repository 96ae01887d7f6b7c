"""A run in the Trace Event Format, which the Perfetto viewer and chrome://tracing open."""

from collections.abc import Iterator

import numpy as np

from jobs.analysis.lives import KINDS, lanes, pieces
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.segments import Segment, segments

Event = dict[str, object]

PHASES, SCHEDULER, DEVICE = 1, 2, 3
"""Threads of a replica's engine; its rows are threads of another process, one for each lane."""
_FIRST_PROCESS = 1_000_001
"""Above any thread's number: the viewer takes a thread of its process's number for the main one, and lists it first."""


def trace_events(run: RecordedRun) -> Iterator[Event]:
    """Times are microseconds since the run's clock_zero; attempts follow one another on the same tracks."""
    named: set[int] = set()
    for segment in segments(run):
        engine = _FIRST_PROCESS + 2 * segment.replica
        rows = engine + 1
        if segment.replica not in named:
            named.add(segment.replica)
            yield from _names(segment.replica, engine, rows)
        yield from _phases(segment, engine)
        yield from _host(segment, engine)
        yield from _device(segment, engine)
        yield from _rows(segment, rows)
        yield from _counters(segment, engine)


def _names(replica: int, engine: int, rows: int) -> Iterator[Event]:
    for pid, name in ((engine, "engine"), (rows, "rows")):
        yield _meta("process_name", pid, 0, name=f"replica {replica}: {name}")
        yield _meta("process_sort_index", pid, 0, sort_index=pid)
    for tid, name in ((PHASES, "phases"), (SCHEDULER, "scheduler"), (DEVICE, "device")):
        yield _meta("thread_name", engine, tid, name=name)
        yield _meta("thread_sort_index", engine, tid, sort_index=tid)


def _meta(what: str, pid: int, tid: int, **args: object) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _span(name: str, pid: int, tid: int, start_ns: float, end_ns: float, **args: object) -> Event:
    start, end = round(start_ns), round(end_ns)
    ts, duration = _microseconds(start), _microseconds(max(end - start, 0))
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": duration, "args": args}


def _microseconds(whole_ns: int) -> float:
    """Such that a thousand times as much, cut to a whole number, is `whole_ns`.

    So the viewer reads it. Of a quotient by 1,000 it would now and then read one nanosecond less, and of a span that
    seems to end behind the one around it nothing at all.
    """
    return (whole_ns + 0.25) / 1e3


def _phases(segment: Segment, pid: int) -> Iterator[Event]:
    for name, start, end in segment.attempt.phases:
        yield _span(name, pid, PHASES, start, end, attempt=segment.attempt.number)


def _host(segment: Segment, pid: int) -> Iterator[Event]:
    """Scheduling and preparing from a step's start on; what its tokens did from its end on."""
    names = ("step", "start_ns", "end_ns", "schedule_ms", "prepare_ms", "postprocess_ms")
    for step, start, end, schedule, prepare, postprocess in zip(
        *(segment.column(name).tolist() for name in names), strict=True
    ):
        scheduled = start + schedule * 1e6
        yield _span("schedule", pid, SCHEDULER, start, scheduled, step=step)
        yield _span("prepare", pid, SCHEDULER, scheduled, scheduled + prepare * 1e6, step=step)
        yield _span("postprocess", pid, SCHEDULER, end, end + postprocess * 1e6, step=step)


def _device(segment: Segment, pid: int) -> Iterator[Event]:
    """A step's device time, up to its end: records have how long it took, not when it began."""
    end = segment.column("end_ns")
    before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    start = np.maximum(end - segment.column("forward_ms") * 1e6, before)
    names = (
        "step",
        "phase",
        "batch_size",
        "num_prefill_tokens",
        "num_decode_tokens",
        "padded_num_tokens",
        "cuda_graph",
        "in_halves",
    )
    columns = [segment.column(name).tolist() for name in names]
    for from_ns, to_ns, *values in zip(start.tolist(), end.tolist(), *columns, strict=True):
        args = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        yield _span(str(args["phase"]), pid, DEVICE, from_ns, to_ns, **args)


def _rows(segment: Segment, pid: int) -> Iterator[Event]:
    """Each request on a lane of its own from arrival to end, its pieces within it."""
    requests = segment.run.requests.select(["seq_id", "row", "sample", "id", "finish_reason"])
    listed = requests.take(segment.request_rows).to_pylist()
    arrived, finished = segment.request("arrived_ns"), segment.request("finished_ns")
    lane = lanes(arrived, finished) + 1
    for tid in np.unique(lane).tolist():
        yield _meta("thread_name", pid, tid, name=f"lane {tid}")
        yield _meta("thread_sort_index", pid, tid, sort_index=tid)
    lane_of: dict[int, tuple[int, int]] = {}
    for request, tid, start, end in zip(listed, lane.tolist(), arrived.tolist(), finished.tolist(), strict=True):
        lane_of[request["seq_id"]] = (tid, end)
        yield _span(f"row {request['row']}", pid, tid, start, end, attempt=segment.attempt.number, **request)
    found = pieces(segment)
    columns = (found.seq_id, found.kind, found.start_ns, found.end_ns)
    for seq_id, kind, start, end in zip(*(column.tolist() for column in columns), strict=True):
        if seq_id in lane_of:  # a killed attempt's last rows have no request
            tid, last = lane_of[seq_id]
            yield _span(KINDS[kind], pid, tid, start, min(end, last))


def _counters(segment: Segment, pid: int) -> Iterator[Event]:
    groups = {
        "KV blocks": {"used": "used_blocks", "cached": "cached_blocks"},
        "rows": {"running": "num_running", "waiting": "num_waiting"},
        "tokens": {"prefill": "num_prefill_tokens", "decode": "num_decode_tokens"},
    }
    times = (segment.column("end_ns") / 1e3).tolist()
    for title, series in groups.items():
        columns = [segment.column(name).tolist() for name in series.values()]
        for at, *values in zip(times, *columns, strict=True):
            args = dict(zip(series, values, strict=True))
            yield {"ph": "C", "name": title, "pid": pid, "tid": 0, "ts": at, "args": args}
