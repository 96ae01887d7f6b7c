"""One thread for torch, also in the processes that tests start: their tensors are too small for a second one to pay.

Without a GPU, Triton's kernels run in its interpreter.
"""

import os


def pytest_configure() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # only now: it reads OMP_NUM_THREADS when it loads

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
