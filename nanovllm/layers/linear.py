"""A bias-free projection."""

import torch
from torch import Tensor, nn

from nanovllm.layers.ops import Ops


class Linear(nn.Module):
    """Weight [out, in], uninitialised until it is loaded."""

    def __init__(self, ops: Ops, in_features: int, out_features: int) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)
