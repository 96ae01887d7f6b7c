"""Kernels in Gluon cannot run without their device, but the installed Triton must compile them."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

KERNELS = (
    "attention_of_long_items",
    "attention_of_short_items",
    "gate",
    "heads",
    "head_of_few_rows",
    "head_of_many_rows",
)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [*((kernel, "bf16") for kernel in KERNELS), (KERNELS[1], "fp16"), (KERNELS[-1], "fp16")]
)
def test_the_installed_triton_compiles_it(kernel: str, dtype: str) -> None:
    """In a process of its own: the others here interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.gluon_compiler", kernel, dtype],
            env=environment | {"TRITON_CACHE_DIR": cache},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"^shared (\d+), wgmma (\d+), setmaxnreg (\d+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    shared, products, registers = map(int, found.groups())
    assert 0 < shared <= 227 * 1024
    assert min(products, registers) > 0
