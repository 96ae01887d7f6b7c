"""Qwen3, dense. A Llama block with an RMS norm on each query and key head, and no attention bias."""

# Shapes: T tokens of all sequences, packed; D model; Q query heads; K key/value heads; H head.

from typing import cast

import torch
from torch import Tensor, nn

from kernels.draws import Draws
from kernels.reference import rotary_table
from nanovllm.layers.attention import AttentionBackend, AttentionMeta, PagedAttention
from nanovllm.layers.linear import Linear
from nanovllm.layers.ops import Ops
from nanovllm.layers.rms_norm import RMSNorm
from nanovllm.models.model_config import Qwen3Config

Tokens = tuple[Tensor, Tensor]
"""Ids, int64 [T], and the tokens that ids below 0 stand for: see kernels.reference.embed."""
Place = tuple[Tensor, Tensor]
"""The rotary table, and each token's position: int64 [T]."""


class Qwen3Attention(nn.Module):
    def __init__(self, ops: Ops, backend: AttentionBackend, c: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.eps = c.rms_norm_eps
        self.head_dim = c.head_dim
        num_heads = c.num_attention_heads + 2 * c.num_key_value_heads
        self.qkv_proj = Linear(ops, c.hidden_size, num_heads * c.head_dim)
        self.o_proj = Linear(ops, c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = RMSNorm(ops, c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(ops, c.head_dim, c.rms_norm_eps)
        self.attention = PagedAttention(backend, layer, c.head_dim)

    def forward(self, x_TD: Tensor, place: Place, meta: AttentionMeta) -> Tensor:
        """What o_proj is to be applied to: [T, Q * H]."""
        k_cache, v_cache = self.attention.caches(meta)
        weights = self.qkv_proj.weight, self.q_norm.weight, self.k_norm.weight
        into = k_cache, v_cache, meta.slot_mapping
        q_TQH = self.ops.linear_norm_rotary_store(x_TD, *weights, self.eps, *place, *into)
        return self.attention(q_TQH, meta).flatten(1)


class Qwen3MLP(nn.Module):
    def __init__(self, ops: Ops, c: Qwen3Config) -> None:
        super().__init__()
        self.gate_up_proj = Linear(ops, c.hidden_size, 2 * c.intermediate_size)
        self.down_proj = Linear(ops, c.intermediate_size, c.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        """What down_proj is to be applied to: [T, intermediate]."""
        return self.gate_up_proj.silu_mul(x_TD)


class Qwen3Block(nn.Module):
    def __init__(self, ops: Ops, backend: AttentionBackend, c: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(ops, c.hidden_size, c.rms_norm_eps)
        self.self_attn = Qwen3Attention(ops, backend, c, layer)
        self.post_attention_layernorm = RMSNorm(ops, c.hidden_size, c.rms_norm_eps)
        self.mlp = Qwen3MLP(ops, c)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        place: Place,
        meta: AttentionMeta,
        next_norm: RMSNorm,
        rows_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(`next_norm` of the residual, residual) from what input_layernorm made of the residual, and that.

        Behind attention, only of the rows `rows_N` where given.
        """
        x_TD = self.self_attn(x_TD, place, meta)
        if rows_N is not None:
            x_TD, residual_TD = x_TD.index_select(0, rows_N), residual_TD.index_select(0, rows_N)
        x_TD, residual_TD = self.self_attn.o_proj.add_norm(x_TD, residual_TD, self.post_attention_layernorm)
        return self.mlp.down_proj.add_norm(self.mlp(x_TD), residual_TD, next_norm)


class Qwen3Model(nn.Module):
    def __init__(self, ops: Ops, backend: AttentionBackend, c: Qwen3Config, num_positions: int) -> None:
        super().__init__()
        self.ops = ops
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, _weight=torch.empty(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleList(Qwen3Block(ops, backend, c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(ops, c.hidden_size, c.rms_norm_eps)
        device = self.embed_tokens.weight.device
        self.rotary = rotary_table(c.head_dim, c.rope_theta, num_positions, device)

    def forward(self, tokens: Tokens, positions_T: Tensor, meta: AttentionMeta, rows_N: Tensor | None = None) -> Tensor:
        ids_T, last_tokens = tokens
        layers = [cast(Qwen3Block, layer) for layer in self.layers]
        norms = [*(layer.input_layernorm for layer in layers), self.norm]
        residual_TD = self.ops.embed(ids_T, self.embed_tokens.weight, last_tokens)
        x_TD: Tensor = norms[0](residual_TD)
        place = self.rotary, positions_T
        for layer, next_norm in zip(layers, norms[1:], strict=True):
            rows = rows_N if layer is layers[-1] else None
            x_TD, residual_TD = layer(x_TD, residual_TD, place, meta, next_norm, rows)
        return x_TD


class Qwen3ForCausalLM(nn.Module):
    """Built on the current default device and dtype; weights are uninitialised until loaded."""

    fused = {  # noqa: RUF012  a table of the class, read by weights.py
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, ops: Ops, backend: AttentionBackend, c: Qwen3Config, num_positions: int) -> None:
        """`num_positions`: longest sequence that will be run."""
        super().__init__()
        self.model = Qwen3Model(ops, backend, c, num_positions)
        self.lm_head = Linear(ops, c.hidden_size, c.vocab_size)
        if c.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)
        self.requires_grad_(False)

    def forward(self, tokens: Tokens, positions_T: Tensor, meta: AttentionMeta, rows_N: Tensor | None = None) -> Tensor:
        """Final hidden states [T, D] of tokens and positions, int64 [T]; [N, D] where `rows_N`, int64, selects some.

        All T tokens' keys and values are stored in any case; the last layer computes no more than that for the rest.
        """
        return self.model(tokens, positions_T, meta, rows_N)

    def sample(self, hidden_MD: Tensor, draws: Draws, last_tokens: Tensor) -> Tensor:
        """Tokens [N] of the first N of the hidden states, one for each of the draws; see kernels.reference.sample."""
        return self.lm_head.sample(hidden_MD, draws, last_tokens)
