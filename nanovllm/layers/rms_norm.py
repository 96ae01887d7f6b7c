"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import torch
from torch import Tensor, nn

from nanovllm.layers.ops import Ops


class RMSNorm(nn.Module):
    """Over the last dimension."""

    def __init__(self, ops: Ops, size: int, eps: float) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)
