"""progress.json: how far the job is, for scripts."""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

NAME = "progress.json"
INTERVAL_S = 1.0

_logger = logging.getLogger(__name__)


class ProgressFile:
    """Replaced as a whole, so a reader finds a whole version; no part of the results, so it is not synced."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._beside = directory / f".{NAME}.tmp"
        self._works = True

    def write(self, state: Mapping[str, object]) -> None:
        """A disk that refuses it ends the file, with a warning, not the job."""
        if not self._works:
            return
        text = json.dumps({**state, "updated": datetime.now(UTC).isoformat()}, indent=2)
        try:
            self._beside.write_text(f"{text}\n", encoding="utf-8")
            os.replace(self._beside, self._path)
        except OSError as error:
            self._works = False
            _logger.warning("%s is not written any more: %s", self._path, error)
