"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits only where it needs its data.

A kernel that takes part calls `overlap_next` first (decode attention last), so that the next one may start, and
`wait_for_previous` before it reads or writes anything that an earlier kernel of the step touches. What stands before
that call must read only what was there when the step began: weights, work lists, block tables. CUDA programming guide,
section of that name. Also, how many programs fill a device.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

FEW_ROWS = 16
"""Up to here the matrix products are kernels of ours, and every kernel takes part. Beyond, they may be cuBLAS's, which
do not, and a kernel between two of them loses by taking part (NOTES.md); who stands between two of ours says so."""


_beside: ContextVar[bool] = ContextVar("beside", default=False)


@contextmanager
def beside_another() -> Iterator[None]:
    """Kernels launched inside run at the same time as another half of the step: each leaves room for the other's."""
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


def runs_beside() -> bool:
    """Whether what is launched now runs beside another half of the step."""
    return _beside.get()


def every_kernel_dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel whose neighbours are ours, so that it takes part."""
    return _TAKES_PART if _can_overlap(device) else STANDS_ALONE


def dependent_launch(device: torch.device, num_rows: int = 0) -> dict[str, bool]:
    """Launch options of a kernel over `num_rows` rows; 0 for one that takes part whatever the rows."""
    return every_kernel_dependent(device) if num_rows <= FEW_ROWS else STANDS_ALONE


_TAKES_PART = {"PDL": True, "launch_pdl": True}
STANDS_ALONE = {"PDL": False}


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_programs(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def overlap_next(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
