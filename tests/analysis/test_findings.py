"""Each finding is made where its cause is, says the key to change, and is not made where the cause is gone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.analysis.findings import MOST, Findings, unfinished
from jobs.analysis.program import main
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.run_lock import RunLock
from tests.analysis.editing import Row, copied, edit, edit_manifest, rows_of
from tests.analysis.made_run import Shape, make_run

ROOMY = Shape(
    num_blocks=2000,
    max_num_seqs=8,
    graphs=False,
    num_rows=80,
    num_prefixes=80,
    eos_share=0.0,
    max_num_batched_tokens=512,
)


def findings(run: Path) -> str:
    return "\n".join(str(finding) for finding in Findings(RunFigures.of(RecordedRun(run))).top())


def test_full_kv_is_found_and_goes_with_more_blocks(tmp_path: Path) -> None:
    tight, roomy = (make_run(tmp_path / str(blocks), replace(ROOMY, num_blocks=blocks)) for blocks in (40, 2000))
    said = findings(tight)
    assert "KV full for" in said
    assert "raise kv.num_blocks=40" in said
    assert "40 blocks, in use" in said
    assert "KV full" not in findings(roomy)


def test_a_full_batch_is_found_and_goes_with_more_slots(tmp_path: Path) -> None:
    few, many = (make_run(tmp_path / str(seqs), replace(ROOMY, max_num_seqs=seqs)) for seqs in (4, 80))
    assert "raise engine.max_num_seqs [engine.max_num_seqs=4" in findings(few)
    assert "engine.max_num_seqs=80" not in findings(many)


def test_a_small_budget_is_found(tmp_path: Path) -> None:
    shape = replace(ROOMY, max_num_batched_tokens=16, prefix_tokens=60, max_tokens=3)
    assert "raise engine.max_num_batched_tokens" in findings(make_run(tmp_path / "run", shape))


def test_recompute_after_preemptions_is_found(tmp_path: Path) -> None:
    shape = replace(ROOMY, num_blocks=60, max_num_seqs=16, max_tokens=160, num_rows=40, prefix_caching=False)
    run = make_run(tmp_path / "run", shape)
    preempted = sum(len(step["preempted_seq_ids"]) for step in rows_of(run, "steps"))
    assert preempted > 3
    assert f"[{preempted} preemptions," in findings(run)


def test_padding_is_found_and_goes_without_graphs(tmp_path: Path) -> None:
    padded, plain = (make_run(tmp_path / str(on), replace(ROOMY, max_num_seqs=5, graphs=on)) for on in (True, False))
    assert "is the padding of steps to their CUDA graphs" in findings(padded)
    assert "padding" not in findings(plain)


def test_a_tail_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(ROOMY, max_num_seqs=80, eos_share=0.2, max_tokens=60))
    longest = max(request["num_output_tokens"] for request in rows_of(run, "requests"))
    assert f"the longest output has {longest} tokens" in findings(run)


def with_gaps(run: Path, prepare_ms: float) -> Path:
    """The device does half of what it did, and the host works for so long before each step."""
    change = {"prepare_ms": prepare_ms}
    edit(run, "steps", lambda rows: [row.update(change, forward_ms=row["forward_ms"] / 2) for row in rows])
    return run


def test_host_gaps_are_found_where_a_limit_is_reached_and_the_hosts_work_makes_them(tmp_path: Path) -> None:
    few, many, idle = (tmp_path / name for name in ("few", "many", "idle"))
    assert "raise engine.max_num_seqs, so that" in findings(with_gaps(make_run(few, ROOMY), 1.5))
    said = findings(with_gaps(make_run(many, replace(ROOMY, max_num_seqs=200)), 5.0))
    assert "the device had nothing to do" not in said, "no batch was full: there is nothing to raise"
    said = findings(with_gaps(make_run(idle, ROOMY), 0.01))
    assert "the device had nothing to do" not in said, "the host did nothing, either"


def test_the_wait_for_the_first_rows_is_no_gap_that_a_larger_batch_closes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ROOMY)
    wait_ns = 10**9

    def begin_later(manifest: Row) -> None:
        for phase in manifest["attempts"][0]["phases"]:
            for name in ("start_ns", "end_ns"):
                is_before = phase["name"] in ("load", "capture") or (phase["name"], name) == ("generate", "start_ns")
                phase[name] += 0 if is_before else wait_ns

    edit_manifest(run, begin_later)
    later = [("start_ns", wait_ns), ("end_ns", wait_ns), ("prepare_ms", 50.0)]
    edit(run, "steps", lambda rows: [row.update({name: row[name] + more for name, more in later}) for row in rows])
    assert "the device had nothing to do" not in findings(run)


def test_a_run_under_way_is_told_from_one_that_was_killed(run: Path, tmp_path: Path) -> None:
    live = copied(run, tmp_path / "run")

    def unfinish(manifest: Row) -> None:
        manifest["status"] = "running"
        manifest["attempts"][-1]["ended"] = None

    edit_manifest(live, unfinish)
    lock = RunLock(live)
    figures = RunFigures.of(RecordedRun(live))
    assert str(unfinished(figures)).startswith("attempt 0 is still running; the records end ")
    lock.release()
    assert str(unfinished(figures)).startswith("attempt 0 did not end by itself; the records end ")


def test_loading_is_found(run: Path, tmp_path: Path) -> None:
    loaded = copied(run, tmp_path / "run")

    def load_longer(manifest: Row) -> None:
        for phase in manifest["attempts"][0]["phases"]:
            for name in ("start_ns", "end_ns"):
                phase[name] += 10**10 * (phase["name"] != "load" or name == "end_ns")

    edit_manifest(loaded, load_longer)
    edit(loaded, "steps", lambda rows: [r.update({n: r[n] + 10**10 for n in ("start_ns", "end_ns")}) for r in rows])
    assert "loading and capturing took" in findings(loaded)


def test_shared_prefixes_that_are_computed_anyway_are_found(tmp_path: Path) -> None:
    shape = replace(ROOMY, num_prefixes=2, prefix_tokens=40, max_tokens=4)
    off, on = (make_run(tmp_path / str(on), replace(shape, prefix_caching=on)) for on in (False, True))
    assert "set kv.prefix_caching=true" in findings(off)
    assert "kv.prefix_caching" not in findings(on)
    evicting = replace(shape, num_blocks=36, num_prefixes=12, max_num_seqs=2)
    said = findings(make_run(tmp_path / "evicting", evicting))
    assert "sort the input so that rows with the same beginning are neighbours" in said
    assert "cached blocks were evicted" in said


def test_a_slow_input_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(ROOMY, max_num_seqs=200))
    assert "rows came too slowly" not in findings(run)
    edit(run, "requests", lambda rows: rows[-1].update(arrived_ns=rows[-1]["finished_ns"]))
    assert "rows came too slowly" in findings(run)


def test_failed_rows_are_found(run: Path, tmp_path: Path) -> None:
    failed = copied(run, tmp_path / "run")
    edit_manifest(failed, lambda m: m["counts"].update(failed=2, failed_by_code={"not_json": 2}))
    assert "2 of 60 rows failed" in findings(failed)
    assert "[not_json 2]" in findings(failed)


def test_there_are_at_most_five_the_costliest_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(Shape(), prefix_caching=False, max_num_seqs=5))
    edit_manifest(run, lambda m: m["counts"].update(failed=2, failed_by_code={"not_json": 2}))
    edit(run, "steps", lambda rows: [row.update(forward_ms=row["forward_ms"] / 2) for row in rows])
    found = Findings(RunFigures.of(RecordedRun(run))).top()
    assert 3 <= len(found) <= MOST
    shares = [finding.share for finding in found]
    assert shares == sorted(shares, reverse=True)


def test_the_screen_is_one_screen_and_sums_to_the_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(run, tmp_path / "run")
    assert main("analyze", [f"run={copy}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines[2:-1])) <= 160
    ledger = [
        line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("wall time"))) + 1 :][:11]
    ]
    shares = [float(next(word for word in words if word.endswith("%"))[:-1]) for words in ledger]
    assert shares[-1] == 100.0
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.5)
    assert json.loads((copy / "manifest.json").read_text())["status"] in lines[0]
    assert any(line.startswith("findings") for line in lines)
