"""A file that an analysis leaves beside what it has read."""

import os
from pathlib import Path

from jobs.usage import UsageError


def write_output(path: Path, data: bytes) -> Path:
    """Writes it whole, or not at all, in the place of an earlier one; UsageError where the directory takes none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb", opener=_private) as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error}") from error
    return path


def _private(path: str, flags: int) -> int:
    """Readable by its owner alone, as everything that a run leaves."""
    return os.open(path, flags, 0o600)
