"""Fills a model's parameters from safetensors, every tensor accounted for, or with random numbers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.errors import ModelError
from nanovllm.models.checkpoint import StoredTensor, check_checkpoint
from nanovllm.models.model_config import parse_config
from nanovllm.models.source import ModelSource

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

DUMMY_STD = 0.02
"""The usual initialisation: behind RMS norms it keeps activations and logits of order one."""


@torch.no_grad()
def load_weights(model: nn.Module, source: ModelSource, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fill every parameter of `model` from `source`'s safetensors, as `dtype` on `device`.

    The model may be on the meta device; its buffers must not. Parameters have the checkpoint's names, except
    that a name of the model's table `fused` ({"qkv_proj": ("q_proj", "k_proj", "v_proj")}) stands for those
    tensors, concatenated along dim 0 in that order. Parameters that share memory still do so afterwards. Reads
    tensor by tensor: peak memory is the model and one tensor.

    Raises ModelError, naming tensor and file, when a tensor is missing, extra, wrongly shaped, in two files,
    truncated, not finite in `dtype`, or a tied model's head that differs from its embedding.
    """
    stored = check_checkpoint(source)
    if not stored:
        raise ModelError(f"model.path={source.name}: has no weights to load; use load_format=dummy")
    parameters = _materialize(model, dtype, torch.device(device))
    shapes = parse_config(source.config).tensor_shapes()
    targets = dict(_targets(parameters, getattr(model, "fused", {}), shapes))
    assert targets.keys() == shapes.keys(), f"the model and config.json differ: {targets.keys() ^ shapes.keys()}"
    with ExitStack() as stack:
        files = _Files(stack)
        for name, target in targets.items():
            _fill(target, files.read(name, stored[name]), f"{stored[name].file}: tensor {name!r}")
        if HEAD in stored and HEAD not in targets:
            _check_tied_head(files, stored)


@torch.no_grad()
def load_dummy(model: nn.Module, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fill every parameter of `model` with random numbers, as `dtype` on `device`: norms 1, the rest normal.

    The same seed, dtype and kind of device give the same weights; logits are finite and of order one.
    """
    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(seed)
    for parameter in _materialize(model, dtype, place).values():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, DUMMY_STD, generator=generator)


def _materialize(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    """Make every parameter NaN, as `dtype` on `device`, and move the buffers; parameters by name, shared ones once.

    NaN, because a parameter that is then forgotten shows in the first logits. One that is already where it
    should be keeps its memory; another is replaced, one at a time.
    """
    meta = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not meta, f"buffers on the meta device have no values: {meta}"
    place = torch.empty(0, device=device).device  # cuda -> cuda:0
    homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            homes.setdefault(parameter, []).append((module, name))
    while homes:
        parameter, owners = homes.popitem()
        if parameter.dtype == dtype and parameter.device == place:
            parameter.fill_(torch.nan)
            continue
        replacement = nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=dtype, device=place), False)
        for module, name in owners:
            setattr(module, name, replacement)
    model.to(place)
    return dict(model.named_parameters())


def _targets(
    parameters: Mapping[str, nn.Parameter],
    fused: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Tensor]]:
    """The memory of each checkpoint tensor: a parameter, or the rows of one that are its."""
    for name, parameter in parameters.items():
        parts = _parts(name, fused)
        rows = [shapes[part][0] for part in parts]
        assert parameter.shape == (sum(rows), *shapes[parts[0]][1:]), f"{name}: {tuple(parameter.shape)} and {parts}"
        yield from zip(parts, parameter.data.split(rows), strict=True)


def _parts(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Checkpoint names that make up the parameter `name`: layers.0.qkv_proj.weight -> layers.0.q_proj.weight, ..."""
    words = name.split(".")
    for position, word in enumerate(words):
        if word in fused:
            return [".".join([*words[:position], part, *words[position + 1 :]]) for part in fused[word]]
    return [name]


def _fill(target: Tensor, values: Tensor, origin: str) -> None:
    target.copy_(values)
    low, high = torch.aminmax(target)  # NaN if any is; half the cost of isfinite, and no temporary
    if not (low.isfinite() and high.isfinite()):
        raise ModelError(f"{origin} is not finite in {target.dtype}; is the file damaged, or model.dtype too narrow?")


def _check_tied_head(files: "_Files", stored: Mapping[str, StoredTensor]) -> None:
    head, embedding = files.read(HEAD, stored[HEAD]), files.read(EMBEDDING, stored[EMBEDDING])
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise ModelError(
            f"{stored[HEAD].file}: tensor {HEAD!r} differs from {EMBEDDING!r}, though config.json says "
            "tie_word_embeddings; set it to false, or remove the tensor"
        )


class _Files:
    """Open safetensors files, each opened when first read."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, safe_open] = {}

    def read(self, name: str, stored: StoredTensor) -> Tensor:
        try:
            if stored.file not in self._open:
                self._open[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
            return self._open[stored.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{stored.file}: tensor {name!r}: {error}") from error
