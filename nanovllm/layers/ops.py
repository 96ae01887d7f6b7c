"""The operations a model is built from, as a type: any module of kernels with these functions will do."""

from typing import Protocol

from torch import Tensor

from kernels.draws import Draws


class Ops(Protocol):
    """See kernels/reference.py for what each of them means. An implementation may write over tensors marked consumed;
    nobody may use these afterwards."""

    def embed(self, ids: Tensor, weight: Tensor, last_tokens: Tensor) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def linear_silu_mul(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """residual is consumed."""
        ...

    def linear_norm_rotary_store(
        self,
        x: Tensor,
        weight: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        rotary: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> Tensor: ...

    def linear_sample(self, x: Tensor, weight: Tensor, draws: Draws, last_tokens: Tensor | None = None) -> Tensor: ...
