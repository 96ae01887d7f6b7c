"""Sequences in a paged KV cache, and the rule by which kernels are judged."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


class Paged:
    """Contexts of several sequences in a cache whose unused memory is NaN, blocks in random order.

    With `shared` = {row: (other row, tokens)} a row begins with the other row's blocks.
    """

    def __init__(
        self,
        contexts: list[int],
        kv_heads: int,
        head_size: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shared: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        widths = [-(-context // block_size) for context in contexts]
        blocks = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        self.contexts, self.block_size = contexts, block_size
        self.tables = torch.zeros(len(contexts), max(widths) + 1, dtype=torch.int32)
        shape = (len(blocks), kv_heads, block_size, head_size)
        self.k_cache = torch.full(shape, math.nan, dtype=dtype)
        self.v_cache = torch.full(shape, math.nan, dtype=dtype)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for i, (context, width) in enumerate(zip(contexts, widths, strict=True)):
            self.tables[i, :width] = torch.tensor([blocks.pop() for _ in range(width)])
            keys = randn(context, kv_heads, head_size, seed=2 * i, dtype=dtype)
            values = randn(context, kv_heads, head_size, seed=2 * i + 1, dtype=dtype)
            if shared and i in shared:
                other, tokens = shared[i]
                self.tables[i, : tokens // block_size] = self.tables[other, : tokens // block_size]
                keys[:tokens], values[:tokens] = self.keys[other][:tokens], self.values[other][:tokens]
            positions = torch.arange(context)
            slots = self.tables[i, positions // block_size].long() * block_size + positions % block_size
            self.keys.append(keys)
            self.values.append(values)
            reference.store_kv(keys, values, self.k_cache, self.v_cache, slots)
        self.k_cache, self.v_cache = self.k_cache.to(device), self.v_cache.to(device)
        self.tables = self.tables.to(device)

    def exact(self, q: Tensor, sequence: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """Causal attention of the sequence's last len(q) tokens, in float64 or as torch does it; on the CPU."""
        context, group = self.contexts[sequence], q.shape[1] // self.k_cache.shape[1]
        keys, values = self.keys[sequence].to(DEVICE, dtype), self.values[sequence].to(DEVICE, dtype)
        k, v = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (keys, values))
        mask = torch.ones(len(q), context, dtype=torch.bool, device=DEVICE).tril(context - len(q))
        queries = q.to(DEVICE, dtype).transpose(0, 1)
        return F.scaled_dot_product_attention(queries, k, v, mask, scale=scale).transpose(0, 1).cpu()


def assert_as_exact_as_torch(actual: Tensor, expected: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    """The kernel may err at most twice as much as plain torch in the same dtype does, and by `floor`.

    A long sum has an error of its own however it is ordered; `floor` is for those.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert not actual.isnan().any()
    error = (actual.double().cpu() - exact).abs().max().item()
    allowed = (expected.double().cpu() - exact).abs().max().item()
    assert error <= 2 * allowed + floor, f"max error {error:.3e}, torch in {actual.dtype} has {allowed:.3e}"
