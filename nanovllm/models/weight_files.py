"""The safetensors files of a model directory: the one file, or those that its index names."""

import os
import reprlib
from pathlib import Path

from nanovllm.errors import ModelError
from nanovllm.models.strict_json import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

UNSAFE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


def find_weight_files(directory: Path) -> tuple[Path, ...]:
    """The one file, or the files that the index names; raises ModelError."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists() and index.exists():
        raise ModelError(f"both {SINGLE_FILE} and {INDEX_FILE} in {directory}; remove the one that is out of date")
    if single.exists():
        return (single,)
    if index.exists():
        return tuple(directory / name for name in sorted(set(read_weight_map(index).values())))
    unsafe = sorted(file.name for file in directory.iterdir() if file.suffix in UNSAFE_WEIGHTS)
    if unsafe:
        raise ModelError(
            f"the weights in {directory} are {unsafe[0]!r}; safetensors only: convert them, in transformers by "
            "from_pretrained and save_pretrained"
        )
    raise ModelError(f"neither {SINGLE_FILE} nor {INDEX_FILE} in {directory}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name; only plain names, so that an index cannot point outside the directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file.endswith(".safetensors")
        if not plain or "\\" in file or "\0" in file:
            raise ModelError(f"{index}: {tensor!r} is in {reprlib.repr(file)}: must be a .safetensors file beside it")
    return weight_map
