"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits only where it needs its data.

A kernel that takes part calls `overlap_next` first, so that the next one may start, and `wait_for_previous` before it
reads or writes anything that an earlier kernel of the step touches. What stands before that call must read only what
was there when the step began: weights, work lists, block tables. CUDA programming guide, section of that name.
"""

import functools

import torch
import triton
import triton.language as tl

FEW_ROWS = 16
"""Up to here the matrix products are kernels of ours, and every kernel takes part. Beyond, they are cuBLAS's, which do
not, and a kernel between two of them loses by taking part (NOTES.md)."""


def dependent_launch(device: torch.device, num_rows: int = 0) -> dict[str, bool]:
    """Launch options of a kernel over `num_rows` rows; 0 for one that takes part whatever the rows."""
    return _TAKES_PART if num_rows <= FEW_ROWS and _can_overlap(device) else STANDS_ALONE


_TAKES_PART = {"PDL": True, "launch_pdl": True}
STANDS_ALONE = {"PDL": False}


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def overlap_next(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
