"""What earlier runs took, from their manifests."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.manifest import COMPLETE
from jobs.manifest import NAME as MANIFEST

OUTPUTS = Path("outputs")
"""Where runs go unless hydra.run.dir says otherwise."""
MAX_MANIFESTS = 2000
"""Looked at, the latest directories first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRun:
    """A run that is complete."""

    directory: Path
    device: str
    seconds: float
    """Of its steps."""
    num_tokens: int
    """Of prompts and outputs."""
    output_tokens_per_row: float


def latest_run(model_path: str, outputs: Path = OUTPUTS) -> EarlierRun | None:
    """The latest complete run of this model.path that has answered anything."""
    for path, manifest in _manifests(outputs):
        if manifest.get("status") != COMPLETE or manifest.get("config", {}).get("model", {}).get("path") != model_path:
            continue
        figures, answered = manifest.get("figures", {}), manifest.get("counts", {}).get("answered", 0)
        num_output = figures.get("num_output_tokens", 0)
        if answered and num_output and figures.get("seconds", 0) > 0:
            return EarlierRun(
                directory=path.parent,
                device=str(manifest.get("device")),
                seconds=figures["seconds"],
                num_tokens=figures["num_prompt_tokens"] + num_output,
                output_tokens_per_row=num_output / answered,
            )
    return None


def _manifests(outputs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Latest first; what cannot be read as one is left out: it is no run of ours, or one being written."""
    paths = sorted((*outputs.glob(f"*/*/{MANIFEST}"), *outputs.glob(f"*/*/*/*/{MANIFEST}")), reverse=True)
    for path in paths[:MAX_MANIFESTS]:
        try:
            manifest = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict):
            yield path, manifest
