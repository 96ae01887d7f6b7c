"""What earlier runs took, from their manifests."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.config import GenerateConfig
from jobs.manifest import COMPLETE
from jobs.manifest import NAME as MANIFEST

OUTPUTS = Path("outputs")
"""Where runs go unless hydra.run.dir says otherwise."""
MAX_MANIFESTS = 2000
"""Looked at, those last written first."""
RECENT = 20
"""Of the runs that are alike: the one with the most output among so many of the latest tells most."""
MOST_APART = 2
"""Rows at once may differ by this factor; with more, the time of a step is shared by far more or fewer rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRun:
    """A run that is complete."""

    directory: Path
    device: str
    seconds: float
    """Of its steps."""
    num_rows: int
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def output_tokens_per_row(self) -> float:
        return self.num_output_tokens / self.num_rows


def similar_run(
    config: GenerateConfig, model_path: str, num_rows: int, *, on_cpu: bool, outputs: Path = OUTPUTS
) -> EarlierRun | None:
    """The largest of the latest complete runs that were as fast a step as a run of `num_rows` rows would be.

    They have its model, dtype, kv.*, engine.*, parallel.* and kind of device, and about as many rows at once.
    """
    wanted = _speed_settings(asdict(config))
    most_at_once = config.engine.max_num_seqs
    at_once = min(num_rows, most_at_once)
    alike = (
        run
        for path, manifest in _latest_first(outputs)
        if _field(manifest, "config", "model", "path") == model_path
        and _speed_settings(manifest["config"]) == wanted
        and (run := _complete_run(path.parent, manifest)) is not None
        and (run.device == "cpu") == on_cpu
        and at_once <= MOST_APART * min(run.num_rows, most_at_once) <= MOST_APART**2 * at_once
    )
    return max(islice(alike, RECENT), key=lambda run: run.num_output_tokens, default=None)


def _speed_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = {name: config.get(name) for name in ("kv", "engine", "parallel")}
    return {**found, "dtype": _field(config, "model", "dtype")}


def _complete_run(directory: Path, manifest: Mapping[str, Any]) -> EarlierRun | None:
    """None where it is not complete, has answered nothing, or took several attempts: its figures are the last one's."""
    figures, num_rows = manifest.get("figures") or {}, _field(manifest, "counts", "answered")
    if manifest.get("status") != COMPLETE or len(manifest.get("attempts") or ()) != 1 or not num_rows:
        return None
    if not figures.get("num_output_tokens") or not figures.get("seconds"):
        return None
    return EarlierRun(
        directory=directory,
        device=str(manifest.get("device")),
        seconds=figures["seconds"],
        num_rows=num_rows,
        num_prompt_tokens=figures["num_prompt_tokens"],
        num_output_tokens=figures["num_output_tokens"],
    )


def _latest_first(outputs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """By the time at which they began; what cannot be read as a manifest is left out: it is no run of ours."""
    paths = [*outputs.glob(f"*/*/{MANIFEST}"), *outputs.glob(f"*/*/*/*/{MANIFEST}")]
    paths = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:MAX_MANIFESTS]
    found: list[tuple[datetime, Path, dict[str, Any]]] = []
    for path in paths:
        try:
            manifest = json.loads(path.read_bytes())
            found.append((datetime.fromisoformat(manifest["clock_zero"]), path, manifest))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    found.sort(key=lambda each: each[0], reverse=True)
    return ((path, manifest) for _, path, manifest in found)


def _field(content: Mapping[str, Any], *names: str) -> Any:
    """None where any of the names is not there."""
    node: Any = content
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node
