"""Which run directories a run= names: one, those of a sweep, those that a glob finds."""

import glob
import json
import sys
from pathlib import Path

from jobs.analysis.recorded_run import RecordedRun
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


def open_runs(key: str, value: str) -> list[RecordedRun]:
    """Those of them that have records; a line on standard error names each that has none, such as a sweep's job that
    failed before it began. UsageError where none has."""
    runs = [RecordedRun(path) for path in find_runs(key, value)]
    if len(runs) == 1:
        runs[0].require_records()
    for run in runs:
        if not run.has_records:
            print(f"left out: {run.path}: {run.why_no_records}", file=sys.stderr)
    found = [run for run in runs if run.has_records]
    if not found:
        raise UsageError(f"{key}={value}: none of these {len(runs)} runs has records")
    return found


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
