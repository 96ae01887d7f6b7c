import pytest
import torch

from kernels import reference
from kernels.embed import embed
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1000, 2560])
def test_ids_below_zero_are_tokens_that_the_device_knows(dtype: torch.dtype, width: int) -> None:
    weight, last = randn(50, width, dtype=dtype, device=DEVICE), torch.tensor([7, 49, 0], dtype=torch.int32).to(DEVICE)
    ids = torch.tensor([3, -1, 49, -3, -2], device=DEVICE)
    out = embed(ids, weight, last)
    assert torch.equal(out, weight[torch.tensor([3, 7, 49, 0, 49], device=DEVICE)])
    assert torch.equal(reference.embed(ids, weight, last), out)
