"""A bias-free projection, alone or with what follows it."""

import torch
from torch import Tensor, nn

from kernels.draws import Draws
from nanovllm.layers.ops import Ops
from nanovllm.layers.rms_norm import RMSNorm


class Linear(nn.Module):
    """Weight [out, in], uninitialised until it is loaded."""

    def __init__(self, ops: Ops, in_features: int, out_features: int) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up of what is gate and up."""
        return self.ops.linear_silu_mul(x, self.weight)

    def add_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of the projection and the residual, which is consumed."""
        return self.ops.linear_add_norm(x, self.weight, residual, norm.weight, norm.eps)

    def sample(self, x: Tensor, draws: Draws, last_tokens: Tensor) -> Tensor:
        """A token of each row of the projection that is drawn from: [N] of x [M, in], which may be padded."""
        return self.ops.linear_sample(x, self.weight, draws, last_tokens)
