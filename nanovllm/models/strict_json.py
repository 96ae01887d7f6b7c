"""JSON of a model's files: one object in UTF-8, no key twice."""

import json
from collections import Counter
from pathlib import Path

from nanovllm.errors import ModelError


def read_json(file: Path) -> dict[str, object]:
    """The object in a file; raises ModelError naming the file."""
    if not file.is_file():
        raise ModelError(f"{file}: not a file")
    try:
        return json_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}") from error


def json_object(data: bytes) -> dict[str, object]:
    """Raises ValueError for anything but one JSON object in UTF-8 without repeated keys."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} occurs twice")
    return unique
