"""One thread for torch: the tensors of the tests are too small for a second one to pay."""

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
