"""sha256 of the model's files, computed beside the run."""

import hashlib
import threading
from pathlib import Path

from nanovllm.models.source import ModelSource

HASHED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")


class FileHashes:
    """Begins to hash the files of a model in a thread."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._files: dict[str, dict[str, object]] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="file-hashes", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all files are hashed; raises OSError where one cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def facts(self) -> dict[str, object]:
        """For the manifest: which model it was, and its files so far with size and sha256."""
        directory = self._source.directory
        return {
            "path": self._source.name,
            "directory": None if directory is None else str(directory),
            "commit": self._source.commit,
            "files": dict(self._files),
        }

    def _run(self) -> None:
        try:
            for file in _files_of(self._source):
                with open(file, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                self._files[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
        except OSError as error:  # raised again by wait()
            self._error = error


def _files_of(source: ModelSource) -> list[Path]:
    """The files that decide answers; without weights to load, the small ones alone."""
    if source.directory is None:
        return []
    wanted = [f for f in sorted(source.directory.iterdir()) if f.is_file() and f.suffix in HASHED_SUFFIXES]
    return [f for f in wanted if f.suffix != ".safetensors" or f in source.weight_files]
