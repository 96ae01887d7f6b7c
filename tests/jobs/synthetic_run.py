"""Run directories whose steps took what a known law says, made from rows, law and settings without a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.record_parts import PartWriter
from jobs.record_schemas import SCHEMAS
from jobs.recorder import ParquetRecorder
from jobs.simulation.cost_model import BETWEEN, GAP, POSTPROCESS, SUBMIT, CostModel
from jobs.simulation.fitting import Fit
from jobs.simulation.forward_cost import FEATURES, ForwardFeatures
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.settings import Settings
from jobs.simulation.simulator import Outcome, simulate

ARCHITECTURE = {
    "num_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
"""Qwen3-0.6B's."""
SETTINGS = Settings(
    block_size=16,
    num_blocks=60_000,
    prefix_caching=True,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    max_model_len=4096,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    num_prompt_tokens: int
    num_output_tokens: int
    shared_prefix_row: int | None = None
    shared_prefix_tokens: int = 0
    finish_reason: str = "length"


def law(
    *,
    forward: Mapping[str, float],
    gap: Mapping[str, float] | None = None,
    submit: Mapping[str, float] | None = None,
    postprocess: Mapping[str, float] | None = None,
    between: Mapping[str, float] | None = None,
    capture_ms: float = 0.0,
    on_gpu: bool = True,
) -> CostModel:
    """A cost model by the names of its features; what is not named costs nothing."""
    return CostModel(
        features=ForwardFeatures.of_model(ARCHITECTURE, on_gpu=on_gpu),
        forward=_exact(FEATURES, forward),
        gap=_exact(GAP, gap or {}),
        schedule=_exact(SUBMIT, {}),
        prepare=_exact(SUBMIT, submit or {}),
        postprocess=_exact(POSTPROCESS, postprocess or {}),
        between=_exact(BETWEEN, between or {}),
        capture_ms=capture_ms,
        warm_up_ms=0.0,
    )


def write_run(
    directory: Path,
    rows: Sequence[Row],
    costs: CostModel,
    settings: Settings = SETTINGS,
    *,
    on_gpu: bool = True,
    attention: str = "triton (auto: measured fastest)",
    graphs: bool = True,
    with_halves: bool = False,
) -> Outcome:
    """A run directory of those rows, as a device with these costs would have left it.

    Where captures cost something, it is of a version that knew no halves and captured graphs late.
    """
    directory.mkdir(parents=True)
    halves = {} if costs.capture_ms and not with_halves else {"halves": with_halves}
    manifest = {
        "schema_version": 1,
        "status": "complete",
        "config": {"input": "rows.jsonl", "sampling": {"max_tokens": None}},
        "attempts": [{"attempt": 0, "phases": []}],
        "engine": {
            "block_size": settings.block_size,
            "num_kv_blocks": settings.num_blocks,
            "enable_prefix_caching": settings.prefix_caching,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "max_model_len": settings.max_model_len,
            "device": "cuda:0" if on_gpu else "cpu",
            "attention": attention,
            "cuda_graphs": "decode steps, prefill steps" if graphs else "off (enforce_eager)",
            **halves,
            "row_multiple": 1 if on_gpu else 16,
            "architecture": ARCHITECTURE,
        },
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    wanted = directory.parent / f"{directory.name}-wanted"
    _write_wanted(wanted, rows, manifest)
    run = RecordedRun("run", wanted)
    recorder = ParquetRecorder.alone(directory)
    outcome = simulate(run.facts, read_rows(run).rows, costs, settings, recorders=[recorder])
    recorder.close()
    _check_shared_prefixes(directory, rows)
    return outcome


def _write_wanted(directory: Path, rows: Sequence[Row], manifest: Mapping[str, object]) -> None:
    """What a simulation asks of a run, before there is one: its rows, and a step that is never looked at."""
    directory.mkdir()
    (directory / "manifest.json").write_text(json.dumps(manifest))
    requests = [
        {
            **dict.fromkeys(SCHEMAS["requests"].names, 0),
            "seq_id": place,
            "row": place,
            "id": str(place),
            "num_prompt_tokens": row.num_prompt_tokens,
            "num_output_tokens": row.num_output_tokens,
            "finish_reason": row.finish_reason,
            "shared_prefix_row": row.shared_prefix_row,
            "shared_prefix_tokens": row.shared_prefix_tokens,
        }
        for place, row in enumerate(rows)
    ]
    step = {name: _empty(SCHEMAS["steps"].field(name).type) for name in SCHEMAS["steps"].names}
    _write(directory, "requests", requests)
    _write(directory, "steps", [step])


def _check_shared_prefixes(directory: Path, rows: Sequence[Row]) -> None:
    """The recorder has found the same in the prompts that were made up; of several rows it may name another one."""
    table = RecordedRun("run", directory).requests.sort_by("seq_id")
    assert table["shared_prefix_tokens"].to_pylist() == [row.shared_prefix_tokens for row in rows]


def _write(directory: Path, table: str, rows: list[dict[str, object]]) -> None:
    writer = PartWriter(directory / "records", table, replica=0, attempt=0)
    writer.write([pa.RecordBatch.from_pylist(rows, SCHEMAS[table])])


def _empty(kind: pa.DataType) -> object:
    return (
        [] if pa.types.is_list(kind) else "" if pa.types.is_string(kind) else False if pa.types.is_boolean(kind) else 0
    )


def _exact(names: tuple[str, ...], costs: Mapping[str, float]) -> Fit:
    assert costs.keys() <= set(names), f"{costs.keys() - set(names)} are no features; {names} are"
    coefficients = np.array([costs.get(name, 0.0) for name in names])
    return Fit(names=names, coefficients=coefficients)
