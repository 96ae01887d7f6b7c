"""The time below which no engine finishes a workload on a GPU, from the bytes and FLOPs that it cannot do without."""

from dataclasses import dataclass

import numpy as np

from jobs.workloads import Workload
from nanovllm.models.model_config import Qwen3Config

NUM_RUNNING = 1024
"""Sequences that the bound lets run at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a GPU was measured to do, which is less than its data sheet says."""

    bytes_per_s: float
    """Read and written, in a copy from device memory to device memory."""
    flops_per_s: float
    """A bfloat16 matrix product of 8192^3."""


GPUS = {
    "NVIDIA H200": Gpu(bytes_per_s=4.28e12, flops_per_s=790e12),
    "NVIDIA H100 80GB HBM3": Gpu(bytes_per_s=3.0e12, flops_per_s=798e12),
}
"""By the device's own name."""

NO_BOUND = f"its speed is not known here (known: {', '.join(GPUS)}), so there is no bound and no fraction of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a token costs a model in bytes and FLOPs."""

    layer_weights: int
    """In the matrices of all layers: each costs 2 FLOPs a token."""
    head_weights: int
    """In the matrix that makes logits: 2 FLOPs a sampled token."""
    weight_bytes: int
    """Of all those, read once a step."""
    kv_bytes: int
    """Of one token in the KV cache."""
    pair_flops: int
    """Of one query token attending to one token."""


def costs(c: Qwen3Config, bytes_per_value: int) -> Costs:
    """For weights and KV cache of the same width."""
    attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    head = c.hidden_size * c.vocab_size
    return Costs(
        layer_weights=layers,
        head_weights=head,
        weight_bytes=(layers + head) * bytes_per_value,
        kv_bytes=2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * bytes_per_value,
        pair_flops=4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim,
    )


def bound_s(load: Workload, model: Costs, gpu: Gpu, *, num_running: int = NUM_RUNNING, cascade: bool = False) -> float:
    """Seconds. A step takes as long as its bytes or its FLOPs do, whichever is longer, and nothing is in between.

    Bytes: each weight once, the KV of each running sequence once, each new token's KV. Waiting prompts are computed
    as soon as fewer than `num_running` run, all in one step, the prefix that they share once in the whole run.
    `cascade`: in decode steps that prefix is read once for all sequences, which is the only way below the plain bound.
    """
    prompt_lens, output_lens = np.array(load.prompt_lens), np.array(load.output_lens)
    context, left = np.empty(0, np.int64), np.empty(0, np.int64)
    num_started, seconds = 0, 0.0
    while num_started < len(prompt_lens) or len(context):
        starting = slice(num_started, num_started + num_running - len(context))
        prompts = prompt_lens[starting]
        context, left = np.append(context, prompts), np.append(left, output_lens[starting])
        if len(prompts):
            seconds += _prefill_s(prompts, load.num_shared, num_started > 0, len(context), model, gpu)
        else:
            seconds += _decode_s(context, load.num_shared if cascade else 0, model, gpu)
        num_started += len(prompts)
        runs_on = left > 1
        context, left = context[runs_on] + 1, left[runs_on] - 1
    return seconds


def _prefill_s(
    prompts: np.ndarray, num_shared: int, shared_is_there: bool, num_sampled: int, model: Costs, gpu: Gpu
) -> float:
    computed = prompts - num_shared
    if not shared_is_there:
        computed[0] += num_shared
    num_tokens = int(computed.sum())
    pairs = int((computed * (prompts - computed) + computed * computed // 2).sum())
    moved = model.weight_bytes + num_tokens * model.kv_bytes
    flops = 2 * (num_tokens * model.layer_weights + num_sampled * model.head_weights) + pairs * model.pair_flops
    return _step_s(moved, flops, gpu)


def _decode_s(context: np.ndarray, num_read_once: int, model: Costs, gpu: Gpu) -> float:
    num_seqs, num_pairs = len(context), int(context.sum())
    num_read = num_pairs - num_read_once * (num_seqs - 1)
    moved = model.weight_bytes + (num_read + num_seqs) * model.kv_bytes
    flops = 2 * num_seqs * (model.layer_weights + model.head_weights) + num_pairs * model.pair_flops
    return _step_s(moved, flops, gpu)


def _step_s(moved: int, flops: int, gpu: Gpu) -> float:
    return max(moved / gpu.bytes_per_s, flops / gpu.flops_per_s)
