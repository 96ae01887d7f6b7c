"""Every figure of the time ledger in a second way: one nanosecond after the other, one sequence after the other."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from jobs.analysis.latencies import slow_rows
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.screen import screen
from jobs.analysis.time_ledger import (
    CAPTURE,
    DECODE,
    HOST,
    LOAD,
    OTHER,
    PADDING,
    PLACES,
    PREFILL,
    RECOMPUTE,
    TAIL,
    UNRECORDED,
    WRITE,
    tail_steps,
)
from tests.analysis.editing import Row, copied, edit_manifest, rows_of, write_table
from tests.analysis.made_run import Shape, make_run

PHASES = {"load": LOAD, "capture": CAPTURE, "write": WRITE, "finish": WRITE}


@pytest.fixture(scope="module")
def tight_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few blocks that rows are preempted and computed again, and one long row that ends alone."""
    shape = Shape(num_blocks=90, max_num_seqs=16, max_tokens=120, eos_share=0.01, num_rows=40, prefix_tokens=4)
    return make_run(tmp_path_factory.mktemp("tight") / "run", shape)


def by_sweeping(run: RecordedRun, steps: list[Row]) -> dict[str, float]:
    """From one edge of the clock to the next: whose time is it?"""
    found: Counter[str] = Counter()
    for attempt in run.attempts:
        mine = [step for step in steps if step["attempt"] == attempt.number]
        exposed: Counter[int] = Counter()
        generate = next(((s, e) for name, s, e in attempt.phases if name == "generate"), None)
        if generate is None and mine:
            generate = (mine[0]["start_ns"], max(step["end_ns"] for step in mine))
        ends = [end for *_, end in attempt.phases] + [step["end_ns"] for step in mine]
        edges = {attempt.started_ns, *ends, *(start for _, start, _ in attempt.phases)}
        edges |= {step[name] for step in mine for name in ("start_ns", "end_ns")} | set(generate or ())
        ordered = sorted(edges)
        oldest = 0  # the first step that has not ended
        for left, right in itertools.pairwise(ordered):
            place = next((PHASES[n] for n, s, e in attempt.phases if n in PHASES and s <= left < e), OTHER)
            while oldest < len(mine) and mine[oldest]["end_ns"] <= left:
                oldest += 1
            if place == OTHER and generate is not None and generate[0] <= left < generate[1]:
                place = HOST if attempt.is_recorded else UNRECORDED
                if oldest < len(mine) and mine[oldest]["start_ns"] <= left:
                    exposed[oldest] += right - left
                    continue
            found[place] += right - left
        found.update(divided(mine, exposed))
    return found


def divided(steps: list[Row], exposed: Counter[int]) -> Counter[str]:
    found: Counter[str] = Counter()
    largest = max((step["batch_size"] for step in steps), default=0)
    reached: dict[int, int] = defaultdict(int)
    small = [step["num_waiting"] == 0 and step["batch_size"] * 8 <= largest for step in steps]
    for at, step in enumerate(steps):
        again = 0
        for seq_id, count, context in zip(
            step["seq_ids"], step["seq_num_tokens"], step["seq_context_lens"], strict=True
        ):
            again += sum(position < reached[seq_id] for position in range(context - count, context))
            reached[seq_id] = max(reached[seq_id], context)
        device = min(step["forward_ms"] * 1e6, exposed[at])
        found[HOST] += exposed[at] - device
        if all(small[at:]):
            found[TAIL] += device
            continue
        for place, tokens in (
            (PREFILL, step["num_prefill_tokens"] - again),
            (DECODE, step["num_decode_tokens"]),
            (RECOMPUTE, again),
            (PADDING, step["padded_num_tokens"] - sum(step["seq_num_tokens"])),
        ):
            found[place] += device * tokens / step["padded_num_tokens"]
    return found


@pytest.mark.parametrize("name", ["run", "plain_run", "resumed_run", "tight_run", "unrecorded_run"])
def test_every_place_of_the_ledger_agrees_with_a_sweep_over_the_clock(
    name: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    run = RecordedRun(path)
    figures = RunFigures.of(run)

    expected = by_sweeping(run, rows_of(path, "steps"))

    for place, amount in figures.ledger.items():
        assert amount == pytest.approx(expected[place], abs=2), place
    assert min(figures.ledger.values()) >= 0


def test_decode_time_says_how_much_of_it_was_in_halves(run: Path, plain_run: Path, tmp_path: Path) -> None:
    figures = RunFigures.of(RecordedRun(run))
    device = {
        flag: sum(
            min(step["forward_ms"] * 1e6, exposed) * step["num_decode_tokens"] / step["padded_num_tokens"]
            for step, exposed, is_tail in zip(
                rows_of(run, "steps"), figures.times[0].exposed, tail_steps(figures.segments[0]), strict=True
            )
            if step["in_halves"] in flag and not is_tail
        )
        for flag in ((True,), (True, False))
    }
    share = device[True,] / device[True, False]
    assert 0.1 < share < 0.9
    assert figures.meanings == PLACES | {DECODE: f"device time of output tokens, {share:.0%} of it in halves"}
    assert RunFigures.of(RecordedRun(plain_run)).meanings == PLACES
    path = copied(run, tmp_path / "run")
    told = f"device time of output tokens, {share:.0%} of it in halves"
    assert any(line.endswith(told) for line in screen(RunFigures.of(RecordedRun(path))))


def test_each_place_has_its_share_in_one_of_the_runs(
    run: Path, resumed_run: Path, tight_run: Path, unrecorded_run: Path
) -> None:
    paths = (run, resumed_run, tight_run, unrecorded_run)
    ledgers = [RunFigures.of(RecordedRun(path)).ledger for path in paths]
    assert all(max(ledger[place] for ledger in ledgers) > 1e5 for place in ledgers[0])


@pytest.mark.parametrize("name", ["run", "resumed_run", "tight_run", "unrecorded_run"])
def test_the_ledger_sums_to_the_wall_time_of_all_attempts(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    run = RecordedRun(path)
    wall = 0
    for attempt in run.attempts:
        steps = [step["end_ns"] for step in rows_of(path, "steps") if step["attempt"] == attempt.number]
        wall += max([end for *_, end in attempt.phases] + steps) - attempt.started_ns
    assert sum(RunFigures.of(run).ledger.values()) == pytest.approx(wall, rel=1e-12)


def test_a_token_that_is_computed_twice_moves_from_prefill_to_recompute(tight_run: Path, tmp_path: Path) -> None:
    """The negative control of the sums: the same tokens under another sequence are computed once."""
    before = RunFigures.of(RecordedRun(tight_run))
    assert before.num_preemptions > 0
    assert before.num_recomputed_tokens > 0
    changed = copied(tight_run, tmp_path / "run")
    steps = rows_of(changed, "steps")
    lives: Counter[int] = Counter()
    for step in steps:
        lives.update(step["preempted_seq_ids"])
        step["seq_ids"] = [seq_id + 1000 * lives[seq_id] for seq_id in step["seq_ids"]]
    write_table(changed, "steps", steps)

    after = RunFigures.of(RecordedRun(changed))

    assert after.num_recomputed_tokens == 0
    assert after.ledger[PREFILL] - before.ledger[PREFILL] == pytest.approx(before.ledger[RECOMPUTE])


def test_latencies_are_those_of_each_request_alone(tight_run: Path) -> None:
    figures = RunFigures.of(RecordedRun(tight_run))
    (latencies,) = figures.latencies
    steps = rows_of(tight_run, "steps")
    seen_preempted = 0
    for at, request in enumerate(rows_of(tight_run, "requests")):
        lost = 0
        for place, step in enumerate(steps):
            if request["seq_id"] in step["preempted_seq_ids"]:
                again = next((s for s in steps[place:] if request["seq_id"] in s["seq_ids"]), None)
                lost += again["start_ns"] - step["start_ns"] if again else 0
        seen_preempted += lost > 0
        assert latencies.preempted[at] == pytest.approx(lost / 1e6)
        first, finished = request["first_token_ns"], request["finished_ns"]
        assert latencies.queued[at] == pytest.approx((request["first_scheduled_ns"] - request["arrived_ns"]) / 1e6)
        assert latencies.to_first_token[at] == pytest.approx((first - request["arrived_ns"]) / 1e6)
        assert latencies.decode[at] == pytest.approx((finished - first - lost) / 1e6)
        if request["num_output_tokens"] > 1:
            per_token = (finished - first) / (request["num_output_tokens"] - 1) / 1e6
            assert latencies.per_token[at] == pytest.approx(per_token)
    assert seen_preempted > 0


def test_figures_are_those_of_the_rows_one_by_one(run: Path) -> None:
    figures, steps, requests = RunFigures.of(RecordedRun(run)), rows_of(run, "steps"), rows_of(run, "requests")
    sampled = sum(sum(step["seq_sampled"]) - len(step["dropped_seq_ids"]) for step in steps)
    assert figures.num_sampled_tokens == sampled == sum(request["num_output_tokens"] for request in requests)
    assert figures.tokens_saved == sum(sum(step["seq_cached_tokens"]) for step in steps)
    prompt_tokens = sum(request["num_prompt_tokens"] for request in requests)
    assert figures.hit_rate == sum(request["num_cached_tokens"] for request in requests) / prompt_tokens
    assert figures.num_preemptions == sum(len(step["preempted_seq_ids"]) for step in steps)
    begin, area, time = steps[0]["start_ns"], 0.0, 0
    for step in steps:
        area += step["batch_size"] * (step["end_ns"] - begin)
        time += step["end_ns"] - begin
        begin = step["end_ns"]
    assert figures.mean_over_time("batch_size") == pytest.approx(area / time)


@pytest.mark.parametrize("name", ["run", "resumed_run", "unrecorded_run"])
def test_the_speed_is_that_of_the_steps_as_a_run_itself_says_it(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    seconds = 0.0
    for attempt in {step["attempt"] for step in rows_of(path, "steps")}:
        steps = [step for step in rows_of(path, "steps") if step["attempt"] == attempt]
        seconds += (steps[-1]["end_ns"] - steps[0]["start_ns"]) / 1e9
    figures = RunFigures.of(RecordedRun(path))
    assert figures.steps_s == pytest.approx(seconds)
    assert figures.tokens_per_s == pytest.approx(figures.num_sampled_tokens / seconds)


def test_what_was_not_recorded_is_in_no_rate_and_in_no_gap(resumed_run: Path, unrecorded_run: Path) -> None:
    whole, partly = (RunFigures.of(RecordedRun(path)) for path in (resumed_run, unrecorded_run))
    lost = [step for step in rows_of(resumed_run, "steps") if step["attempt"] == 1]
    lost_ns = lost[-1]["end_ns"] - lost[0]["start_ns"]
    assert partly.ledger[UNRECORDED] == lost_ns > 0
    assert partly.ledger[HOST] < whole.ledger[HOST]
    assert partly.generate_s == pytest.approx(whole.generate_s - lost_ns / 1e9)
    assert partly.wall_s == pytest.approx(whole.wall_s)
    assert partly.num_steps == whole.num_steps - len(lost)


def test_what_an_attempt_did_after_its_records_broke_off_is_no_gap(run: Path, tmp_path: Path) -> None:
    """A full disk: it generated for longer than there are steps."""
    broken = copied(run, tmp_path / "run")
    write_table(broken, "steps", rows_of(run, "steps")[:40])
    edit_manifest(broken, lambda manifest: manifest["attempts"][0].update(sealed=False))
    found = RunFigures.of(RecordedRun(broken))
    last = rows_of(broken, "steps")[-1]["end_ns"]
    assert found.generate_s == (last - rows_of(broken, "steps")[0]["start_ns"]) / 1e9
    taken_for_sealed = copied(broken, tmp_path / "sealed")
    edit_manifest(taken_for_sealed, lambda manifest: manifest["attempts"][0].pop("sealed"))
    other = RunFigures.of(RecordedRun(taken_for_sealed))
    moved = found.ledger[OTHER] - other.ledger[OTHER]
    assert other.ledger[HOST] - found.ledger[HOST] == pytest.approx(moved)
    assert moved > 1e8


def test_a_run_without_a_step_has_a_ledger_too(run: Path, tmp_path: Path) -> None:
    """It was killed while it loaded."""
    killed = copied(run, tmp_path / "run")
    for table in ("steps", "block_events", "requests"):
        write_table(killed, table, [])

    def killed_while_loading(manifest: Row) -> None:
        attempt = manifest["attempts"][0]
        attempt |= {"ended": None, "phases": attempt["phases"][:1]}
        manifest.update(status="running")

    edit_manifest(killed, killed_while_loading)

    ledger = RunFigures.of(RecordedRun(killed)).ledger

    assert ledger[LOAD] > 0
    assert sum(ledger.values()) == 80_000_000


def test_slow_rows_are_those_of_the_longest_service_and_say_what_took_it(tight_run: Path) -> None:
    figures = RunFigures.of(RecordedRun(tight_run))
    taken = {r["row"]: (r["finished_ns"] - r["first_scheduled_ns"]) / 1e6 for r in rows_of(tight_run, "requests")}
    tokens = {r["row"]: r["num_output_tokens"] for r in rows_of(tight_run, "requests")}
    preemptions = {r["row"]: r["num_preemptions"] for r in rows_of(tight_run, "requests")}
    found = slow_rows(figures.run, figures.latencies, len(taken))
    assert [slow.taken_ms for slow in found] == pytest.approx(sorted(taken.values(), reverse=True))
    for slow in found:
        assert slow.taken_ms == pytest.approx(taken[slow.row])
        assert slow.reason
        if "output tokens" in slow.reason:
            assert f"for {tokens[slow.row]:,} output tokens" in slow.reason
        if "preempted" in slow.reason:
            count = preemptions[slow.row]
            assert ("preempted once" if count == 1 else f"preempted {count} times") in slow.reason
    assert any("preempted" in slow.reason for slow in found)
