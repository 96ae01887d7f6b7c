"""Starting the stand-in job as a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start(cwd: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.jobs.standin", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_until_ready(process: subprocess.Popen[str]) -> Path:
    """The run directory, once the job has printed it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("READY "):
            return Path(line.removeprefix("READY ").strip())
    raise AssertionError(f"the job ended before it was ready: {process.communicate()}")


def manifests(directory: Path) -> dict[Path, dict[str, Any]]:
    """Every manifest below a directory, by its run directory."""
    return {path.parent: json.loads(path.read_text()) for path in sorted(directory.rglob("manifest.json"))}
