"""Arrays on their way to the device: all of a step's in one copy from pinned memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16
_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


@dataclass(frozen=True, slots=True)
class Segment:
    """An array's place in a buffer."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    """Bytes from the buffer's start."""

    @property
    def end(self) -> int:
        return self.begin + int(np.prod(self.shape)) * self.dtype.itemsize

    def in_array(self, buffer: np.ndarray) -> np.ndarray:
        return buffer[self.begin : self.end].view(self.dtype).reshape(self.shape)

    def in_tensor(self, buffer: Tensor) -> Tensor:
        return buffer[self.begin : self.end].view(_TORCH_DTYPES[self.dtype]).view(self.shape)


def lay_out(arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Segment]:
    """Segments one after the other, aligned, in the mapping's order."""
    segments, begin = {}, 0
    for name, (dtype, shape) in arrays.items():
        segments[name] = Segment(dtype, shape, begin)
        begin = -(-segments[name].end // _ALIGNMENT) * _ALIGNMENT
    return segments


class Uploader:
    """Sends arrays of any sizes. Up to `depth` sends may be under way at a time; the caller sees to that."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self._device = device
        self._buffers = [_PinnedBuffer() for _ in range(depth)] if device.type == "cuda" else []
        self._next = 0

    def send(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The arrays (int32 and int64) on the device; on a CPU they are shared, not copied."""
        if self._device.type != "cuda":
            return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        segments = lay_out({name: (array.dtype, array.shape) for name, array in arrays.items()})
        size = max(segment.end for segment in segments.values())
        pinned = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        pinned.reserve(size)
        for name, array in arrays.items():
            segments[name].in_array(pinned.array)[...] = array
        on_device = torch.empty(size, dtype=torch.uint8, device=self._device)
        on_device.copy_(pinned.tensor[:size], non_blocking=True)
        return {name: segment.in_tensor(on_device) for name, segment in segments.items()}


@dataclass(frozen=True, slots=True)
class Padding:
    """An input of fixed capacity: entries beyond those sent have the value `fill`."""

    dtype: type
    shape: tuple[int, ...]
    fill: int


class FixedInputs:
    """Tensors at fixed addresses, for a CUDA graph, filled by one copy. Up to `depth` sends may be under way.

    The last input is copied only as far as it is filled; it needs no padding.
    """

    def __init__(self, inputs: Mapping[str, Padding], device: torch.device, depth: int) -> None:
        self._inputs = dict(inputs)
        self._segments = lay_out({name: (np.dtype(i.dtype), i.shape) for name, i in inputs.items()})
        self._last = next(reversed(self._inputs))
        size = max(segment.end for segment in self._segments.values())
        on_gpu = device.type == "cuda"
        self._device_buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._pinned = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(depth)]
        self._views = [
            {name: segment.in_array(pinned.numpy()) for name, segment in self._segments.items()}
            for pinned in self._pinned
        ]
        self._next = 0
        self.num_bytes = size
        """On the device."""
        self.tensors = {name: segment.in_tensor(self._device_buffer) for name, segment in self._segments.items()}

    def send(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Fill the inputs, each with an array of its dtype; one that is not among `arrays` gets nothing but padding."""
        assert arrays.keys() <= self._inputs.keys(), f"no such inputs: {arrays.keys() - self._inputs.keys()}"
        views, pinned = self._views[self._next], self._pinned[self._next]
        self._next = (self._next + 1) % len(self._views)
        for name, view in views.items():
            array = arrays.get(name)
            count = 0 if array is None else len(array)
            if array is not None:
                assert array.dtype == view.dtype, f"{name} is {view.dtype}, not {array.dtype}"
                view[:count] = array
            if name != self._last:
                view[count:] = self._inputs[name].fill
        last = self._segments[self._last]
        used = len(arrays[self._last]) if self._last in arrays else 0
        size = last.begin + used * (last.end - last.begin) // last.shape[0]
        self._device_buffer[:size].copy_(pinned[:size], non_blocking=True)


class _PinnedBuffer:
    """Page-locked bytes that grow, seldom."""

    def __init__(self) -> None:
        self.reserve(1 << 20)

    def reserve(self, size: int) -> None:
        if hasattr(self, "tensor") and len(self.tensor) >= size:
            return
        self.tensor = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=True)
        self.array = self.tensor.numpy()
