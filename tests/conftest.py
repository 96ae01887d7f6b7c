"""One thread for torch, also in the processes that tests start: their tensors are too small for a second one to pay.

Without a GPU, Triton's kernels run in its interpreter.
"""

import os
from collections.abc import Generator

import pytest


def pytest_configure() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # only now: it reads OMP_NUM_THREADS when it loads

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has written, surrogates and all, must reach the process that reports it (xdist) as UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
