"""The directory of one run: its name, its exclusive claim, and giving it back."""

import contextlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from jobs import disk
from jobs.compose import Composition
from jobs.manifest import NAME as MANIFEST
from jobs.masking import Masker
from jobs.progress_file import NAME as PROGRESS
from jobs.usage import UsageError

MAX_NAME = 80
ALLOWED_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
"""No = and no comma: DuckDB would read them as hive columns, Hydra could not read them back."""
RUN_LOG = "run.log"
HYDRA_DIR = ".hydra"
RESULTS = (
    "generations.jsonl",
    "generations.partial.jsonl",
    "generations.parquet",
    "failures.jsonl",
    "failures.partial.jsonl",
    "batch_errors.jsonl",
    "records",
)
"""A directory that holds one of these, without a manifest, is the rest of a run: new parts must not mix with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """A directory that this process alone writes a run into."""

    path: Path
    created: tuple[Path, ...]
    """The directories that did not exist before, outermost first."""

    def discard(self) -> bool:
        """Removes the directory of a run that never began, if this process made it and it holds no result.

        Returns whether it is gone. Files that are still empty are no result. Parents that were made for it go too,
        unless others have begun to use them.
        """
        if self.path not in self.created or self._holds_results():
            return False
        shutil.rmtree(self.path)
        _remove_empty(self.created)
        return True

    def _holds_results(self) -> bool:
        others = [entry for entry in self.path.iterdir() if entry.name not in (MANIFEST, HYDRA_DIR, RUN_LOG, PROGRESS)]
        files = [file for entry in others for file in (entry, *entry.rglob("*")) if not file.is_dir()]
        return any(file.stat().st_size > 0 for file in files)


def file_name(text: str, suffix: str = "") -> str:
    """A name of at most 80 characters of [A-Za-z0-9._-], not hidden, ending in `suffix`."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-") or "run"
    return clean[: MAX_NAME - len(suffix)].rstrip("._-") + suffix


def claim(wanted: Path, chosen: bool, create_manifest: Callable[[Path], None]) -> RunDirectory:
    """Makes the directory this run's own; of two processes that want one at the same instant, one gets it.

    `create_manifest` must fail with FileExistsError where a manifest exists. A `chosen` directory is taken as it is
    or refused with UsageError, when it holds a run already or its name is not allowed. Any other is a pattern's
    result: characters that are not allowed are replaced, and -2, -3, ... is added until the name is free.
    """
    try:
        if chosen:
            return _claim_chosen(wanted, create_manifest)
        return _claim_free_name(wanted, create_manifest)
    except OSError as error:
        raise UsageError(f"hydra.run.dir={wanted}: cannot be used for a run: {error}") from error


def make_free(wanted: Path, parents: bool = True) -> tuple[Path, ...]:
    """Creates a directory that did not exist, adding -2, -3, ... to its name; all that was created, outermost first."""
    created = _make_parents(wanted.parent) if parents else ()
    for number in range(1, 10_000):
        suffix = f"-{number}" if number > 1 else ""
        path = wanted.parent / file_name(wanted.name, suffix)
        try:
            disk.make_directory(path)
        except FileExistsError:
            continue
        return (*created, path)
    raise UsageError(f"{wanted}: this name and 9999 like it are taken")


def write_hydra_files(directory: Path, composition: Composition, masker: Masker) -> None:
    """Writes .hydra/{config,overrides,hydra}.yaml as Hydra does, secrets masked; what is there of them stays."""
    hydra = masker.unresolved(composition.hydra)
    for name in ("help", "hydra_help"):
        hydra.pop(name)
    hydra.run.dir = str(directory)
    hydra.runtime.output_dir = str(directory)
    # Unresolved: reading an item of this list would put the value of an ${oc.env:...} in its place.
    given: Any = OmegaConf.to_container(composition.hydra.overrides, resolve=False)
    hydra.overrides = {kind: [masker.argument(text) for text in given[kind]] for kind in ("task", "hydra")}
    target = directory / HYDRA_DIR
    target.mkdir(exist_ok=True)
    _write_yaml(target / "config.yaml", masker.unresolved(composition.tree))
    _write_yaml(target / "overrides.yaml", OmegaConf.create(hydra.overrides["task"]))
    _write_yaml(target / "hydra.yaml", OmegaConf.create({"hydra": hydra}))


def append_to_log(directory: Path, name: str, text: str) -> None:
    """Adds an error to a run.log whose logging has ended or never began."""
    with open(directory / RUN_LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] [{name}] [ERROR] {text}")


def _claim_chosen(wanted: Path, create_manifest: Callable[[Path], None]) -> RunDirectory:
    if not ALLOWED_NAME.fullmatch(wanted.name):
        raise UsageError(
            f"hydra.run.dir={wanted}: the name {wanted.name!r} is not allowed; use up to {MAX_NAME} characters of "
            f"A-Z a-z 0-9 _ - and, after the first, dots: {file_name(wanted.name)}"
        )
    holds = next((name for name in (MANIFEST, *RESULTS) if (wanted / name).exists()), None)
    if holds is None:
        created = _make_parents(wanted)
        try:
            create_manifest(wanted)
            return RunDirectory(path=wanted, created=created)
        except FileExistsError:
            holds = MANIFEST  # another process was faster
        except BaseException:
            _remove_empty(created)
            raise
    raise UsageError(f"hydra.run.dir={wanted}: already holds a run ({holds}); choose another directory")


def _claim_free_name(wanted: Path, create_manifest: Callable[[Path], None]) -> RunDirectory:
    while True:
        created = make_free(wanted)
        try:
            create_manifest(created[-1])
            return RunDirectory(path=created[-1], created=created)
        except FileExistsError:  # someone chose this very directory between the two lines
            continue
        except BaseException:
            _remove_empty(created)
            raise


def _make_parents(directory: Path) -> tuple[Path, ...]:
    """Creates what is missing of this path; what was created, outermost first."""
    created: list[Path] = []
    for path in (*reversed(directory.parents), directory):
        try:
            disk.make_directory(path)
            created.append(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        except OSError:
            if not path.is_dir():  # "/" and read-only mounts answer with other errors where the directory exists
                _remove_empty(tuple(created))
                raise
    return tuple(created)


def _remove_empty(created: tuple[Path, ...]) -> None:
    for path in reversed(created):
        with contextlib.suppress(OSError):  # not empty: another run has begun to use it
            path.rmdir()


def _write_yaml(path: Path, content: DictConfig | ListConfig) -> None:
    if path.exists() and path.stat().st_size:
        return
    # A command line may hold bytes that are not UTF-8; they are written as escapes.
    path.write_bytes(OmegaConf.to_yaml(content).encode("utf-8", "backslashreplace"))
