"""The text of the log's memory lines."""

import sys
from pathlib import Path

GIGABYTE = 10**9
"""The log's GB: a thousand million bytes."""


def cpu_memory() -> str:
    """This process's resident memory; where the system has no /proc, the most it ever was."""
    return f"CPU Memory: RSS={_resident_bytes() / GIGABYTE:.2f}GB"


def gpu_memory(device: int = 0) -> str:
    """What torch's allocator has handed out and what it holds on a CUDA device. Reads counters, waits for nothing."""
    import torch

    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return f"GPU Memory [Device {device}]: Allocated={allocated / GIGABYTE:.2f}GB, Reserved={reserved / GIGABYTE:.2f}GB"


def _resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
