"""One thread for torch, also in the processes that tests start: their tensors are too small for a second one to pay."""

import os


def pytest_configure() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
