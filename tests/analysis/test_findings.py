"""Each finding is made where its cause is, says the key to change, and is not made where the cause is gone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.analysis.findings import MOST, Findings
from jobs.analysis.program import main
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
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


def test_host_gaps_are_found(run: Path, tmp_path: Path) -> None:
    slow = copied(run, tmp_path / "run")
    edit(slow, "steps", lambda rows: [row.update(forward_ms=row["forward_ms"] / 2) for row in rows])
    assert "the device had nothing to do for" in findings(slow)


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
