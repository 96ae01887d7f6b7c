"""The tensors of a checkpoint, from the headers of its safetensors files, checked without importing torch."""

import reprlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

from nanovllm.errors import ModelError
from nanovllm.models.model_config import parse_config
from nanovllm.models.source import ModelSource
from nanovllm.models.strict_json import json_object
from nanovllm.models.weight_files import INDEX_FILE, SINGLE_FILE, read_weight_map

DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Dtypes of safetensors that weights may have; integers and 8-bit floats belong to quantized checkpoints."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a checkpoint keeps one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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
    weight_map = read_weight_map(index)
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
            header = json_object(stream.read(length))
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
