"""Memory that the process holds."""

import os
from pathlib import Path

import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")


def free_host_memory() -> int:
    """Bytes that the system could give to a process without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * _PAGE


def device_memory(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) bytes of a CUDA device's allocator; on a CPU both are the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    resident = int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    return resident, resident
