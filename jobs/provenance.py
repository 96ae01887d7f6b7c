"""Where a run happened: packages, commit, machine. Imports none of what it names."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "nanovllm",
    "torch",
    "triton",
    "flash-attn",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "hydra-core",
    "omegaconf",
    "pyarrow",
    "duckdb",
    "numpy",
    "msgspec",
    "xxhash",
    "jinja2",
)
GIT_TIMEOUT_S = 10

_CPU_INFO, _GPU_DRIVER = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")
_MODEL_NAME = re.compile(r"^model name\s*: (.+)$", re.MULTILINE)
_DRIVER_VERSION = re.compile(r"^NVRM version:.*?\s(\d+\.[\d.]+)\s", re.MULTILINE)


def versions() -> dict[str, str | None]:
    """Version of each package that can change a result; null where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _first_match(_CPU_INFO, _MODEL_NAME),
        "gpu_driver": _first_match(_GPU_DRIVER, _DRIVER_VERSION),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def git(root: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout whose top is `root`; null where there is none or git cannot say."""
    if not (root / ".git").exists():
        return None
    status = _git(root, "status", "--porcelain")
    if status is None:
        return None
    return {"commit": _git(root, "rev-parse", "--verify", "HEAD"), "dirty": bool(status)}


def _first_match(file: Path, pattern: re.Pattern[str]) -> str | None:
    """None where there is no such file, as without a GPU, or it says something else."""
    try:
        found = pattern.search(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a checkout on a filesystem that does not answer
        return None
    return done.stdout.strip() if done.returncode == 0 else None
