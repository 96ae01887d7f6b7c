"""From `model.path` to the files of one model, checked without importing torch."""

import json
import os
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

from nanovllm.config import LOAD_FORMATS, check_choice
from nanovllm.errors import ModelError
from nanovllm.models.model_config import parse_config
from nanovllm.text import has_tokenizer

TINY = "tiny"
"""The checkpoint that ships with the project; a directory of that name is reached as ./tiny."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TEXT_PATTERNS = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
WEIGHT_PATTERNS = ("*.safetensors",)
UNSAFE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")

DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Dtypes of safetensors that weights may have; integers and 8-bit floats belong to quantized checkpoints."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a checkpoint keeps one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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


def check_checkpoint(source: ModelSource) -> dict[str, StoredTensor]:
    """Account for every tensor of the checkpoint from the files' headers alone, in milliseconds.

    Holds afterwards: every file is there and whole, its header is sane, and the tensors are, by name and
    shape, the ones that config.json calls for, each in one file. The only tensor that may be there without
    being called for is the `lm_head.weight` of a tied model. Returns where each tensor is; raises ModelError
    naming the file and the tensor. A source with dummy weights has no tensors.
    """
    if not source.weight_files:
        return {}
    try:
        tensors = _read_tensors(source)
        _account(source, tensors)
    except ModelError as error:
        raise ModelError(f"model.path={source.name}: {error}") from error
    return tensors


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
    config = _read_json(directory / "config.json")
    parse_config(config, str(directory / "config.json"))
    generation_file = directory / "generation_config.json"
    shipped_only = (_HERE / "configs") in directory.parents
    return ModelSource(
        name=path,
        directory=None if shipped_only else directory,
        commit=commit,
        config=config,
        generation_config=_read_json(generation_file) if generation_file.exists() else {},
        weight_files=() if dummy else _weight_files(directory),
        has_tokenizer=has_tokenizer(directory),
    )


def _weight_files(directory: Path) -> tuple[Path, ...]:
    """The one file, or the files that the index names."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists() and index.exists():
        raise ModelError(f"both {SINGLE_FILE} and {INDEX_FILE} in {directory}; remove the one that is out of date")
    if single.exists():
        return (single,)
    if index.exists():
        return tuple(directory / name for name in sorted(set(_weight_map(index).values())))
    unsafe = sorted(file.name for file in directory.iterdir() if file.suffix in UNSAFE_WEIGHTS)
    if unsafe:
        raise ModelError(
            f"the weights in {directory} are {unsafe[0]!r}; safetensors only: convert them, in transformers by "
            "from_pretrained and save_pretrained"
        )
    raise ModelError(f"neither {SINGLE_FILE} nor {INDEX_FILE} in {directory}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name; only plain names, so that an index cannot point outside the directory."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file.endswith(".safetensors")
        if not plain or "\\" in file or "\0" in file:
            raise ModelError(f"{index}: {tensor!r} is in {reprlib.repr(file)}: must be a .safetensors file beside it")
    return weight_map


def _read_json(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise ModelError(f"{file}: not a file")
    try:
        return _json_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}") from error


def _json_object(data: bytes) -> dict[str, object]:
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


def _read_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in source.weight_files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise ModelError(f"{name!r} is in two files, {tensors[name].file.name} and {file.name}")
            tensors[name] = tensor
    index = source.weight_files[0].parent / INDEX_FILE
    if source.weight_files[0].name != SINGLE_FILE or index.exists():
        _compare_with_index(index, tensors)
    return tensors


def _compare_with_index(index: Path, tensors: dict[str, StoredTensor]) -> None:
    weight_map = _weight_map(index)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(f"{index.with_name(file)}: no tensor {name!r}, which {index.name} says is there")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise ModelError(f"{tensor.file}: tensor {name!r} is not in {index.name}")


def _account(source: ModelSource, tensors: dict[str, StoredTensor]) -> None:
    """Names and shapes are those of config.json, no fewer and no more."""
    config = parse_config(source.config)
    shapes = config.tensor_shapes()
    files = ", ".join(sorted({file.name for file in source.weight_files})[:3])
    for name in shapes:
        if name not in tensors:
            raise ModelError(f"no tensor {name!r} in {files}; config.json calls for it")
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ModelError(f"{tensor.file}: tensor {name!r} is none of this model's")
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{tensor.file}: tensor {name!r} has the shape {list(tensor.shape)}; "
                f"config.json calls for {list(shapes[name])}"
            )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise ModelError(f"{file}: the file is missing; fetch the model again")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}: truncated, or not safetensors")
            header = _json_object(stream.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        return _tensors_of_header(file, header, size - 8 - length)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}") from error


def _tensors_of_header(file: Path, header: dict[str, object], num_bytes: int) -> dict[str, StoredTensor]:
    """Raises ValueError unless the tensors fill the `num_bytes` after the header without gap or overlap."""
    tensors = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        tensors[name] = StoredTensor(file=file, dtype=dtype, shape=shape)
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise ValueError(f"tensor {name!r} begins at byte {begin} instead of {expected}: an overlap or a gap")
        expected = end
        if end > num_bytes:
            raise ValueError(f"tensor {name!r} ends at byte {end} of {num_bytes}: the file is truncated")
    if expected != num_bytes:
        raise ValueError(f"{num_bytes - expected} bytes after the last tensor")
    return tensors


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and byte after the last of one tensor."""
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r}: not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(
            f"tensor {name!r} has the dtype {reprlib.repr(dtype)}; must be one of {', '.join(DTYPE_BYTES)} "
            "(quantized checkpoints are not supported)"
        )
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name!r}: shape and data_offsets must be short lists of integers of at least 0")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"tensor {name!r}: {end - begin} bytes do not fit {reprlib.repr(shape)} of {dtype}")
    return dtype, tuple(shape), begin, end


def _naturals(values: object) -> TypeGuard[list[int]]:
    """A short list of integers that fit 64 bits: a hostile header must not make arithmetic slow."""
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**63 for v in values)
