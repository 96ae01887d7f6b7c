"""The engine's random traces, recorded and audited: whatever the engine does, its records are sound."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from jobs.analysis.audit import audit
from jobs.recorder import ParquetRecorder
from nanovllm.engine import scheduler
from tests.analysis.editing import rows_of
from tests.analysis.made_run import ZERO
from tests.engine.traces import Trace, _Run, random_trace


def recorded(trace: Trace, directory: Path, seen: Counter[str]) -> Path:
    """The run directory of a trace; its rows that did not end by themselves are nowhere."""
    directory.mkdir()
    with patch.object(scheduler, "GROWTH_STEPS", trace.growth_steps):
        run = _Run(trace, seen, 64, False)
        recorder = ParquetRecorder.alone(directory)
        run.engine.recorders.append(recorder)
        run.run()
        recorder.close()
    answers = [output for output in run.outputs.values() if output.finish_reason in ("stop", "length")]
    lines = [
        {
            "row": output.row,
            "sample": 0,
            "num_prompt_tokens": output.num_prompt_tokens,
            "num_output_tokens": len(output.token_ids),
            "finish_reason": output.finish_reason,
            "token_ids": output.token_ids,
        }
        for output in answers
    ]
    (directory / "generations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    phases = [{"name": "generate", "start_ns": 0, "end_ns": run.now}]
    manifest = {
        "schema_version": 1,
        "status": "interrupted",
        "clock_zero": ZERO.isoformat(),
        "engine": {"num_kv_blocks": trace.num_blocks, "block_size": trace.block_size},
        "attempts": [{"attempt": 0, "started": ZERO.isoformat(), "ended": ZERO.isoformat(), "phases": phases}],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize("lookahead", [0, 1])
def test_random_traces_leave_sound_records(lookahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen: Counter[str] = Counter()
    for seed in range(50_000, 50_060):
        # One at a time nobody aborts in a job: it gives up all of them, at its end.
        given_up = 10 if seed % 4 == 0 else None
        trace = replace(random_trace(seed), lookahead=lookahead, abort_rate=0.0, abort_all_before_step=given_up)
        path = recorded(trace, tmp_path / f"{seed}", seen)
        found = audit(path)
        assert found.first is None, f"seed {seed}: {found}"
        seen["block events"] += found.num_block_events
        seen["drops recorded"] += sum(len(step["dropped_seq_ids"]) for step in rows_of(path, "steps"))
    assert min(seen[what] for what in ("preemptions", "evictions", "prefix hits", "ends by error", "abort_all")) > 5, (
        seen
    )
    assert seen["block events"] > 3000
    assert (seen["drops recorded"] > 0) == (lookahead > 0)
