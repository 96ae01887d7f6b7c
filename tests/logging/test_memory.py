import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm.logging.memory import _resident_bytes, cpu_memory, gpu_memory


def test_the_line_of_a_machine_without_gpu_shows_resident_memory():
    assert re.fullmatch(r"CPU Memory: RSS=\d+\.\d\dGB", cpu_memory())


def test_resident_memory_is_the_kernels_number(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t   1024 kB\nThreads:\t1\n")
    assert _resident_bytes(status) == 1024 * 1024


def test_without_a_proc_file_system_the_peak_is_shown(tmp_path: Path):
    assert _resident_bytes(tmp_path / "missing") > 2**20


def test_the_line_of_a_gpu_shows_what_torch_handed_out_and_holds(monkeypatch: pytest.MonkeyPatch):
    counters = SimpleNamespace(
        memory_allocated=lambda device: 1_254_000_000 + device, memory_reserved=lambda device: 2_000_000_000
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=counters))
    assert gpu_memory(1) == "GPU Memory [Device 1]: Allocated=1.25GB, Reserved=2.00GB"
