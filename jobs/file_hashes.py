"""sha256 of the files that decide answers, model's and input's, computed beside the run."""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.input_paths import STANDARD_INPUT, is_regular, printable
from nanovllm.models.source import ModelSource

HASHED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
SMALL_BYTES = 32 * 1024 * 1024
"""Files up to this size are hashed before the run begins, in some 20 ms; larger ones in a thread."""
_CHUNK_BYTES = 4 * 1024 * 1024


class FileHashes:
    """Begins to hash the files of a model and of an input: small ones at once, the others in a thread.

    `fingerprint` is what a later attempt is compared with. Until a file's hash is known, its size and, of an input
    file, its time of modification stand for it.
    """

    def __init__(
        self, source: ModelSource, inputs: Sequence[str], known: Mapping[str, Mapping[str, Any] | None] | None = None
    ) -> None:
        """`known` is a fingerprint whose hashes have just been verified. Raises OSError for an unreadable file."""
        self._source = source
        self._model = {file: _stamp(file) for file in _files_of(source)}
        self._input = {Path(path): _stamp(Path(path)) for path in inputs if path != STANDARD_INPUT and is_regular(path)}
        self._num_inputs = len(inputs)
        self._num_told = 0
        self._num_hashed = 0
        self._error: OSError | None = None
        if known is not None:
            self._take_over(known)
        for path, stamp in self._stamps():
            if stamp["sha256"] is None and stamp["bytes"] <= SMALL_BYTES:
                self._hash(path, stamp)
        self._thread = threading.Thread(target=self._run, name="file-hashes", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all files are hashed; raises OSError where one cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def facts(self) -> dict[str, object]:
        """For the manifest: which model it was, and its files with size and, as far as known, sha256."""
        directory = self._source.directory
        return {
            "path": self._source.name,
            "directory": None if directory is None else str(directory),
            "commit": self._source.commit,
            "files": {
                path.name: {"bytes": stamp["bytes"], "sha256": stamp["sha256"]} for path, stamp in self._model.items()
            },
        }

    @property
    def has_news(self) -> bool:
        """Whether a hash has become known since the last `fingerprint`."""
        return self._num_hashed > self._num_told

    def fingerprint(self) -> dict[str, Any]:
        """{input, model}: the files that decide answers. `input` is null for what can be read only once."""
        self._num_told = self._num_hashed
        readable_again = len(self._input) == self._num_inputs
        return {
            "input": {printable(str(path)): dict(stamp) for path, stamp in self._input.items()}
            if readable_again
            else None,
            "model": self.facts()["files"],
        }

    def _take_over(self, known: Mapping[str, Mapping[str, Any] | None]) -> None:
        for path, stamp in self._input.items():
            stamp["sha256"] = (known["input"] or {}).get(printable(str(path)), {}).get("sha256")
        for path, stamp in self._model.items():
            stamp["sha256"] = (known["model"] or {}).get(path.name, {}).get("sha256")

    def _stamps(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        yield from self._input.items()
        yield from self._model.items()

    def _run(self) -> None:
        try:
            for path, stamp in self._stamps():
                if stamp["sha256"] is None:
                    self._hash(path, stamp)
        except OSError as error:  # raised again by wait()
            self._error = error

    def _hash(self, path: Path, stamp: dict[str, Any]) -> None:
        """Of as many bytes as the file had: what is appended meanwhile shows in the size."""
        digest, remaining = hashlib.sha256(), stamp["bytes"]
        with open(path, "rb", buffering=0) as stream:
            while remaining and (chunk := stream.read(min(remaining, _CHUNK_BYTES))):
                digest.update(chunk)
                remaining -= len(chunk)
        stamp["sha256"] = digest.hexdigest()
        self._num_hashed += 1


def file_differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What tells two fingerprints apart, each in words that name the file; empty when they are of the same files.

    `now` must have all its hashes. Of a file whose hash `before` does not have, the rest must agree.
    """
    found = []
    for kind in ("input", "model"):
        old, new = before[kind] or {}, now[kind] or {}
        found += [f"{kind} {name}: is not among the files of the run" for name in new if name not in old]
        found += [f"{kind} {name}: is gone" for name in old if name not in new]
        found += [f"{kind} {name}: {what}" for name in new if name in old for what in _changes(new[name], old[name])]
    return found


def _changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    if now["bytes"] != before["bytes"]:
        yield f"has {now['bytes']:,} bytes; in the run it had {before['bytes']:,}"
    elif before["sha256"] is not None:
        if now["sha256"] != before["sha256"]:
            yield f"has the sha256 {now['sha256']}; in the run it had {before['sha256']}"
    elif now.get("mtime_ns") != before.get("mtime_ns"):
        yield "was written to after the run began, which died before it could hash it"


def _stamp(path: Path) -> dict[str, Any]:
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": None}


def _files_of(source: ModelSource) -> list[Path]:
    """The files that decide answers; without weights to load, the small ones alone."""
    if source.directory is None:
        return []
    wanted = [f for f in sorted(source.directory.iterdir()) if f.is_file() and f.suffix in HASHED_SUFFIXES]
    return [f for f in wanted if f.suffix != ".safetensors" or f in source.weight_files]
