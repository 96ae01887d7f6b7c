"""The dtypes that kernels are tested in: bfloat16 only on a GPU, since Triton's interpreter truncates to it."""

import pytest
import torch

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
