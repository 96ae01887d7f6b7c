"""report.html shows what the records say, and stays small."""

import json
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.analysis.block_map import block_map, event_times
from jobs.analysis.lives import KINDS, pieces
from jobs.analysis.prefixes import prefix_uses
from jobs.analysis.program import main
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.segments import segments
from jobs.analysis.sweep_screen import COLUMNS
from tests.analysis.editing import Row, copied, edit, edit_manifest, rows_of
from tests.analysis.made_run import Shape, make_run
from tests.analysis.test_report import elements, parsed


def test_a_sweeps_report_has_the_figures_of_each_run(tmp_path: Path) -> None:
    for seqs in (4, 8):
        make_run(tmp_path / "sweep" / f"job-{seqs}", Shape(max_num_seqs=seqs))
    assert main("analyze", [f"run={tmp_path / 'sweep'}"]) == 0
    data = data_of(tmp_path / "sweep")
    assert data["runs"] == [["job-4", "complete"], ["job-8", "complete"]]
    assert data["deltas"] == [["engine.max_num_seqs", ["4", "8"]]]
    expected = [RunFigures.of(RecordedRun(tmp_path / "sweep" / name)).facts() for name, _ in data["runs"]]
    for title, values in data["figures"]:
        key = next(key for key, shown in COLUMNS.items() if shown == title)
        assert values == [facts[key] for facts in expected]
    assert not (tmp_path / "sweep" / "job-4" / "report.html").exists()


def data_of(run: Path) -> dict[str, Any]:
    (content,) = [node.text for node in elements(parsed(run / "report.html")) if node.attrib.get("id") == "data"]
    return json.loads(content or "")


@pytest.mark.parametrize("name", ["run", "plain_run", "resumed_run"])
def test_the_report_has_every_step_and_every_row(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = copied(request.getfixturevalue(name), tmp_path / "run")
    assert main("analyze", [f"run={path}"]) == 0
    data, steps, requests = data_of(path), rows_of(path, "steps"), rows_of(path, "requests")
    assert data["steps"]["each"] == data["rows"]["each"] == 1
    assert data["steps"]["batch"] == [step["batch_size"] for step in steps]
    assert data["steps"]["sampled"] == [sum(step["seq_sampled"]) for step in steps]
    assert data["steps"]["halves"] == [step["in_halves"] for step in steps]
    assert data["steps"]["used"] == [step["used_blocks"] for step in steps]
    assert sorted(data["rows"]["row"]) == sorted(request["row"] for request in requests)
    assert sum(ms for _, ms, _ in data["ledger"]) > 0
    for found, total in zip(data["latencies"], (len(requests),) * 3, strict=True):
        assert sum(found["counts"]) <= total
    assert sum(data["latencies"][0]["counts"]) == len(requests)


def test_a_night_between_attempts_takes_no_room(resumed_run: Path, tmp_path: Path) -> None:
    """Each attempt but the first was an hour later."""
    near, far = copied(resumed_run, tmp_path / "near" / "run"), copied(resumed_run, tmp_path / "far" / "run")
    hour = 3_600_000_000_000

    def later(rows: list[Row]) -> None:
        for row in rows:
            times = [name for name in row if name.endswith("_ns") and row[name] is not None]
            row.update({name: row[name] + hour * row["attempt"] for name in times})

    def later_attempts(manifest: Row) -> None:
        for attempt in manifest["attempts"]:
            late = attempt["attempt"]
            started = datetime.fromisoformat(attempt["started"]) + timedelta(hours=late)
            attempt["started"] = started.isoformat()
            for phase in attempt["phases"]:
                phase |= {name: phase[name] + hour * late for name in ("start_ns", "end_ns")}

    edit(far, "steps", later)
    edit(far, "requests", later)
    edit_manifest(far, later_attempts)
    for path in (near, far):
        assert main("analyze", [f"run={path}"]) == 0
    data, moved = data_of(near), data_of(far)
    assert max(rows["start_ns"] for rows in rows_of(far, "steps")) > 2 * hour
    assert moved["paused"] - data["paused"] == pytest.approx(2 * hour / 1e6)
    for drawn in ("steps", "rows", "blocks", "ledger", "prefixes"):
        assert moved[drawn] == data[drawn]


def test_many_steps_become_marks_that_keep_their_sums(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(run, tmp_path / "run")
    monkeypatch.setattr("jobs.analysis.report_data.MOST_STEPS", 50)
    monkeypatch.setattr("jobs.analysis.report_data.MOST_ROWS", 20)
    assert main("analyze", [f"run={path}"]) == 0
    data, steps = data_of(path), rows_of(path, "steps")
    assert data["steps"]["each"] == 7
    assert len(data["steps"]["end"]) == 46
    assert sum(data["steps"]["prefill"]) == sum(step["num_prefill_tokens"] for step in steps)
    assert sum(data["steps"]["halves"]) == sum(step["in_halves"] for step in steps) > 0
    assert sum(data["steps"]["preempted"]) == sum(step["num_preempted"] for step in steps) > 0
    assert data["steps"]["batch"][0] == pytest.approx(sum(s["batch_size"] for s in steps[:7]) / 7, abs=0.06)
    assert (data["rows"]["each"], len(data["rows"]["row"])) == (3, 20)


@pytest.mark.parametrize("name", ["run", "plain_run", "resumed_run"])
def test_the_block_map_is_that_of_a_replay(name: str, request: pytest.FixtureRequest) -> None:
    run = RecordedRun(request.getfixturevalue(name))
    found = list(segments(run))
    edges = np.linspace(int(run.step_column("start_ns").min()), int(run.step_column("end_ns").max()), 90).astype(
        np.int64
    )
    drawn = block_map(found, 40, edges)
    assert drawn.used.shape == (40, 90)
    seen: Counter[str] = Counter()
    for segment in found:
        events, times = segment.events, event_times(segment)
        begin, end = int(segment.column("start_ns")[0]), int(segment.column("end_ns").max())
        users, holds, at = Counter[int](), set[int](), 0
        for column, edge in enumerate(edges.tolist()):
            if not begin <= edge <= end:
                continue
            while at < len(events) and min(int(times[at]), end) <= edge:
                block, kind = int(events.block_id[at]), int(events.kind[at])
                users[block] += int(events.users[at])
                if kind == 2:
                    holds.add(block)
                if kind == 5:
                    holds.discard(block)
                at += 1
            used = [100 if users[block] else 0 for block in range(40)]
            cached = [100 if not users[block] and block in holds else 0 for block in range(40)]
            assert drawn.used[:, column].tolist() == used
            assert drawn.cached[:, column].tolist() == cached
            seen.update(used=sum(used), cached=sum(cached))
    assert min(seen.values()) > 1000


def test_hit_rates_by_prefix_are_those_of_the_rows_that_begin_alike(run: Path) -> None:
    """Each row of a made run begins with one of three prefixes of three blocks."""
    uses, total = prefix_uses(list(segments(RecordedRun(run))), 10)
    expected: dict[int, list[int]] = {}
    for request in rows_of(run, "requests"):
        numbers = expected.setdefault(request["row"] % 3, [0, 0, 0])
        for place, amount in enumerate((1, request["num_prompt_tokens"], request["num_cached_tokens"])):
            numbers[place] += amount
    assert total == 3
    assert {use.row: [use.num_requests, use.num_prompt_tokens, use.num_cached_tokens] for use in uses} == expected


def test_prefixes_of_one_row_alone_are_not_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", Shape(num_rows=40, num_prefixes=30))
    uses, total = prefix_uses(list(segments(RecordedRun(run))), 100)
    assert [use.row for use in uses] == list(range(10)), "rows 30 to 39 begin like rows 0 to 9"
    assert total == 10


@pytest.mark.parametrize("name", ["run", "plain_run", "resumed_run"])
def test_the_pieces_of_a_row_follow_one_another(name: str, request: pytest.FixtureRequest) -> None:
    kinds: Counter[str] = Counter()
    for segment in segments(RecordedRun(request.getfixturevalue(name))):
        found = pieces(segment)
        for seq_id in np.unique(found.seq_id):
            mine = found.seq_id == seq_id
            order = np.argsort(found.start_ns[mine], kind="stable")
            start, end = found.start_ns[mine][order], found.end_ns[mine][order]
            assert (end >= start).all()
            assert (start[1:] >= end[:-1]).all(), f"seq_id {seq_id}"
            kinds.update(KINDS[kind] for kind in found.kind[mine].tolist())
    assert min(kinds[kind] for kind in ("waiting", "prefill", "decode", "preempted")) > 0


LARGE = Shape(
    num_rows=12_400,
    num_blocks=12_000,
    block_size=16,
    max_num_seqs=256,
    max_num_batched_tokens=4096,
    max_tokens=400,
    num_prefixes=40,
    prefix_tokens=300,
    eos_share=0.004,
)


def size_and_time(tmp_path: Path, shape: Shape) -> tuple[int, float, int]:
    """(bytes of the report, seconds that the command took, steps)"""
    run = make_run(tmp_path / "run", shape)
    start = time.monotonic()
    assert main("analyze", [f"run={run}"]) == 0
    seconds = time.monotonic() - start
    return (run / "report.html").stat().st_size, seconds, RecordedRun(run).steps.num_rows


def test_a_tenth_of_a_large_run_is_well_within_the_limits(tmp_path: Path) -> None:
    size, seconds, steps = size_and_time(tmp_path, replace(LARGE, num_rows=1300))
    assert steps > 1000
    assert size < 2_000_000
    assert seconds < 5


@pytest.mark.slow
def test_ten_thousand_steps_of_256_rows_take_under_ten_seconds_and_megabytes(tmp_path: Path) -> None:
    size, seconds, steps = size_and_time(tmp_path, LARGE)
    assert steps >= 10_000
    assert size < 10_000_000
    assert seconds < 10
