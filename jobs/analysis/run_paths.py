"""Which run directories a run= names: one, those of a sweep, those that a glob finds."""

import glob
import json
from pathlib import Path

from jobs.manifest import NAME as MANIFEST
from jobs.usage import UsageError


def find_runs(key: str, value: str) -> list[Path]:
    """The directories, oldest run first; UsageError where there is none."""
    named = [Path(value)] if Path(value).is_dir() else [Path(path) for path in sorted(glob.glob(value))]
    found = [run for path in named for run in _runs_in(path)]
    if not found:
        what = "holds no run" if named else "does not exist"
        raise UsageError(
            f"{key}={value}: {what}; it must be a run directory (one with a {MANIFEST}), the directory of a sweep, "
            "or a glob of these"
        )
    return sorted(dict.fromkeys(found), key=lambda path: (_started(path), path))


def find_run(key: str, value: str) -> Path:
    """The one directory; UsageError where there is none, or several."""
    found = find_runs(key, value)
    if len(found) > 1:
        shown = ", ".join(str(path) for path in found[:3])
        raise UsageError(f"{key}={value}: is {len(found)} runs ({shown}, ...); this command takes one")
    return found[0]


def _runs_in(path: Path) -> list[Path]:
    if (path / MANIFEST).is_file():
        return [path]
    return sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))


def _started(run: Path) -> str:
    """When it started, as text that sorts; the reader of its manifest says what is wrong with one."""
    try:
        return str(json.loads((run / MANIFEST).read_bytes()).get("clock_zero", ""))
    except (OSError, ValueError, AttributeError):
        return ""
