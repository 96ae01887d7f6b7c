"""The operations a model is built from, as a type: any module of kernels with these functions will do."""

from typing import Protocol

from torch import Tensor


class Ops(Protocol):
    """See kernels/reference.py for what each of them means."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def silu_mul(self, x: Tensor) -> Tensor: ...

    def apply_rotary(self, x: Tensor, cos_sin: Tensor) -> Tensor: ...

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None: ...

    def paged_decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor: ...

    def paged_prefill_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_lens: list[int],
        context_lens: list[int],
        scale: float,
    ) -> Tensor: ...
