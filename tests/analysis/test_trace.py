"""The trace is what the Trace Event Format asks for, and says what the records say."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from jobs.analysis.lives import lanes
from jobs.analysis.program import main
from tests.analysis.editing import Row, copied, edit, rows_of

Event = dict[str, Any]


@pytest.fixture(scope="module", params=["run", "plain_run", "resumed_run"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    path = copied(request.getfixturevalue(request.param), tmp_path_factory.mktemp("traced") / "run")
    assert main("trace", [f"run={path}"]) == 0
    return path, json.loads((path / "trace.json").read_bytes())["traceEvents"]


def test_every_event_has_what_its_kind_needs(traced: tuple[Path, list[Event]]) -> None:
    _, events = traced
    assert Counter(event["ph"] for event in events).keys() == {"M", "X", "C"}
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    for event in events:
        assert event["pid"] in named
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in threads
            assert event["ts"] >= 0
            assert event["dur"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())


def read_ns(microseconds: float) -> int:
    """As Perfetto's importer reads a time."""
    return int(microseconds * 1000.0)


def nesting(events: list[Event]) -> tuple[int, int]:
    """(spans that the importer would drop, how deep the others nest).

    By its rule: in whole nanoseconds, a span that begins within another one does not end behind it.
    """
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((read_ns(event["ts"]), read_ns(event["dur"])))
    dropped = deepest = 0
    for spans in tracks.values():
        stack: list[int] = []
        for start, duration in sorted(
            spans, key=lambda span: span[0]
        ):  # of equal ones the first in the file comes first
            while stack and stack[-1] <= start:
                stack.pop()
            if stack and start + duration > stack[-1]:
                dropped += 1
                continue
            stack.append(start + duration)
            deepest = max(deepest, len(stack))
    return dropped, deepest


def test_spans_of_a_track_nest_to_the_nanosecond(traced: tuple[Path, list[Event]]) -> None:
    """A row's pieces lie within the row."""
    _, events = traced
    assert nesting(events) == (0, 2)


def test_times_of_any_nanosecond_come_through(run: Path, tmp_path: Path) -> None:
    """Those of the runs made here are whole microseconds, which hide what a quotient loses."""
    path = copied(run, tmp_path / "run")

    def stretch(rows: list[Row]) -> None:
        for row in rows:
            row.update({name: round(row[name] * 1.2345678912345) for name in row if name.endswith("_ns") and row[name]})

    edit(path, "steps", stretch)
    edit(path, "requests", stretch)
    assert main("trace", [f"run={path}"]) == 0
    events = json.loads((path / "trace.json").read_bytes())["traceEvents"]
    assert nesting(events) == (0, 2)
    starts = {read_ns(event["ts"]) for event in events if event["name"] == "schedule"}
    assert starts == {row["start_ns"] for row in rows_of(path, "steps")}
    assert any(read_ns(start / 1e3) < start for start in starts), "a quotient would have done"


def test_tracks_say_what_the_tables_say(traced: tuple[Path, list[Event]]) -> None:
    path, events = traced
    steps, requests = rows_of(path, "steps"), rows_of(path, "requests")
    device = [event for event in events if event["ph"] == "X" and event["tid"] == 3 and "phase" in event["args"]]
    assert [event["args"]["step"] for event in device] == [step["step"] for step in steps]
    for event, step in zip(device, steps, strict=True):
        assert event["ts"] + event["dur"] == pytest.approx(step["end_ns"] / 1e3)
        assert event["dur"] <= step["forward_ms"] * 1e3 + 1e-3
        assert event["args"].items() <= step.items()
        assert event["args"].keys() >= {"padded_num_tokens", "in_halves"}
    rows = {
        (event["args"]["attempt"], event["args"]["seq_id"])
        for event in events
        if "finish_reason" in event.get("args", {})
    }
    assert rows == {(request["attempt"], request["seq_id"]) for request in requests}
    used = [event["args"]["used"] for event in events if event["name"] == "KV blocks"]
    assert used == [step["used_blocks"] for step in steps]
    pieces = Counter(event["name"] for event in events if event["ph"] == "X")
    assert pieces["waiting"] == len(requests)
    assert pieces["decode"] > 0
    again = [
        seq_id
        for at, step in enumerate(steps)
        for seq_id in step["preempted_seq_ids"]
        if any(seq_id in later["seq_ids"] for later in steps[at:])  # else a step under way has ended it
    ]
    assert pieces["preempted"] == len(again)


def test_lanes_are_few_and_none_is_used_twice_at_once() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    start = random.integers(0, 1000, 300)
    end = start + random.integers(1, 60, 300)

    lane = lanes(start, end)

    for one in np.unique(lane):
        order = np.flatnonzero(lane == one)[np.argsort(start[lane == one], kind="stable")]
        assert (start[order][1:] >= end[order][:-1]).all()
    most = max(int(((start <= t) & (end > t)).sum()) for t in range(1100))
    assert len(np.unique(lane)) == most
