"""From `model.path` to the files of one model, checked without importing torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nanovllm.config import LOAD_FORMATS, check_choice
from nanovllm.errors import ModelError
from nanovllm.models.model_config import parse_config
from nanovllm.models.strict_json import read_json
from nanovllm.models.weight_files import find_weight_files
from nanovllm.text import has_tokenizer

TINY = "tiny"
"""The checkpoint that ships with the project; a directory of that name is reached as ./tiny."""

TEXT_PATTERNS = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
WEIGHT_PATTERNS = ("*.safetensors",)

_HERE = Path(__file__).parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One model: what was asked for and the files that answer it."""

    name: str
    """`model.path` as it was given."""
    directory: Path | None
    """Where the model's files lie; None when only the config.json that ships with the project is there."""
    commit: str | None
    """Commit of a hub snapshot; None for a directory."""
    config: dict[str, object]
    """config.json; `parse_config` accepts it."""
    generation_config: dict[str, object]
    """generation_config.json; empty without one."""
    weight_files: tuple[Path, ...]
    """The safetensors files, by name, whether or not they exist; empty for dummy weights."""
    has_tokenizer: bool


def resolve_model(path: str, revision: str | None = None, load_format: str = "safetensors") -> ModelSource:
    """Find the model that `path` names: `tiny`, a directory, or a hub id, which is downloaded if need be.

    A hub id comes from the local cache when the hub cannot be reached. With load_format dummy no weights are
    looked for or downloaded, and the named models need no network at all: they fall back to the config.json
    that ships with the project. Raises ModelError, naming the path and the cure.
    """
    check_choice("model.load_format", load_format, LOAD_FORMATS)
    dummy = load_format == "dummy"
    local, exists = _as_local(path)
    commit = None
    if exists or not _HUB_ID.fullmatch(path):
        directory = _local_directory(path, local, revision)
    else:
        directory = _hub_directory(path, revision, dummy)
        commit = directory.name if _COMMIT.fullmatch(directory.name) else None
    try:
        return _read_source(path, directory, commit, dummy)
    except ModelError as error:
        raise ModelError(f"model.path={path}: {error}") from error


def _as_local(path: str) -> tuple[Path, bool]:
    """The place on this machine that `path` would be, and whether something is there."""
    try:
        local = _HERE / TINY if path == TINY else Path(path).expanduser()
        return local, local.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, an unknown ~user
        raise ModelError(f"model.path={path!r}: {error}") from error


def _local_directory(path: str, local: Path, revision: str | None) -> Path:
    given = f"model.path={path}"
    if not local.exists():
        raise ModelError(f"{given}: no such directory, and not a hub id (owner/name)")
    if not local.is_dir():
        raise ModelError(f"{given}: is a file; give the directory that holds config.json and the weights")
    if revision is not None:
        raise ModelError(f"model.revision={revision}: only a hub id has revisions, and {path} is a directory")
    try:
        code = sorted(name for name in os.listdir(local) if name.endswith(".py"))
    except OSError as error:
        raise ModelError(f"{given}: {error}") from error
    if code:
        raise ModelError(
            f"{given}: holds Python code ({code[0]!r}); code of a model is never run: if the model works without it, "
            "move it away"
        )
    return local


def _hub_directory(path: str, revision: str | None, dummy: bool) -> Path:
    """The snapshot of a hub id; for dummy weights of a named model, without any network."""
    shipped = _HERE / "configs" / path
    if not dummy or revision is not None or not shipped.is_dir():
        return _snapshot(path, revision, dummy, local_files_only=False)
    try:
        cached = _snapshot(path, None, dummy, local_files_only=True)
    except ModelError:  # not in the cache
        return shipped
    return cached if (cached / "config.json").is_file() else shipped


def _snapshot(path: str, revision: str | None, dummy: bool, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_PATTERNS, *(() if dummy else WEIGHT_PATTERNS)]
    try:
        directory = snapshot_download(
            path,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],  # a model's files are at the top; patterns alone match subfolders, too
            local_files_only=local_files_only,
        )
    except Exception as error:  # the HTTP library's errors too, and which one that is depends on the version
        raise ModelError(f"model.path={path}: {_hub_complaint(error, path, revision)}") from error
    return Path(directory)


def _hub_complaint(error: Exception, path: str, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub wants you to accept the model's terms and to log in (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has the model but not model.revision={revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such directory, and no such model on the hub (or it is private: `hf auth login`)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "no such directory, not (fully) in the local hub cache"
            + (f" at model.revision={revision}" if revision else "")
            + ", and the hub cannot be reached; download it where there is a network, with "
            f"`hf download {path}`, or give a local directory"
        )
    reason = str(error).strip().splitlines()[:1]
    return f"cannot be fetched from the hub: {type(error).__name__}: {''.join(reason)}"


def _read_source(path: str, directory: Path, commit: str | None, dummy: bool) -> ModelSource:
    if not (directory / "config.json").is_file():
        raise ModelError(f"no config.json in {directory}; it must be a model in the Hugging Face format")
    config = read_json(directory / "config.json")
    parse_config(config, str(directory / "config.json"))
    generation_file = directory / "generation_config.json"
    shipped_only = (_HERE / "configs") in directory.parents
    return ModelSource(
        name=path,
        directory=None if shipped_only else directory,
        commit=commit,
        config=config,
        generation_config=read_json(generation_file) if generation_file.exists() else {},
        weight_files=() if dummy else find_weight_files(directory),
        has_tokenizer=has_tokenizer(directory),
    )
