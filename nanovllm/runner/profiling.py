"""How much memory is left for the KV cache beside the largest steps that can ever run."""

import gc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import LLMConfig
from nanovllm.engine.plan import Admission, Plan
from nanovllm.models.model_config import Qwen3Config
from nanovllm.runner.graph_sizes import GraphSizes
from nanovllm.runner.kv_cache import allocate
from nanovllm.runner.memory import free_host_memory
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling_params import ResolvedSampling

MIN_GRAPH_BYTES = 2**20
"""What a captured graph takes beside the memory that graphs share, at least."""


def available_kv_bytes(
    make_runner: Callable[[Tensor, GraphSizes | None], ModelRunner],
    graph_sizes: GraphSizes | None,
    c: Qwen3Config,
    config: LLMConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> int:
    """Free bytes of a GPU less what a runner takes, by building one and running its largest steps; on a CPU, free
    memory.

    `make_runner` builds a runner over a KV cache with CUDA graphs of the given sizes.
    """
    if device.type != "cuda":
        return free_host_memory()
    trials = _trials(config.engine.max_num_batched_tokens, config.engine.max_num_seqs, max_model_len)
    blocks = max(sum(-(-length // config.kv.block_size) for length in lengths) for lengths in trials)
    kv_cache = allocate(c, blocks, config.kv.block_size, dtype, device)
    free, reserved = _free(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner = make_runner(kv_cache, graph_sizes and graph_sizes.largest())
    for lengths in trials:
        runner.submit(_prefill_plan(lengths, config.kv.block_size))
        runner.collect()
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_reserved(device) - reserved
    if graph_sizes is not None:
        needed += _graphs_bytes(runner, graph_sizes, free - torch.cuda.mem_get_info(device)[0], reserved, device)
    del kv_cache, runner
    gc.collect()  # a runner and its graphs refer to each other
    return _free(device) - needed


def _graphs_bytes(runner: ModelRunner, sizes: GraphSizes, taken: int, reserved: int, device: torch.device) -> int:
    """Bytes that all graphs will take: each its inputs, and outside of the allocator what the few of the trial took."""
    assert runner.graphs is not None
    outside = taken - (torch.cuda.memory_reserved(device) - reserved)
    each = max(outside // runner.graphs.num_graphs, MIN_GRAPH_BYTES) + runner.graphs.most_input_bytes
    return sizes.most_graphs() * each


def _free(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _trials(budget: int, max_num_seqs: int, max_model_len: int) -> list[list[int]]:
    """Lengths of the rows of steps that take most memory: few long rows, and as many as may run, of all the budget."""
    longest = max_model_len - 1
    trials = []
    for length in (min(budget, longest), max(1, min(budget // max_num_seqs, longest))):
        num_rows = min(max_num_seqs, budget // length)
        rest = budget - num_rows * length
        trials.append([length] * num_rows + ([min(rest, longest)] if rest and num_rows < max_num_seqs else []))
    return trials


def _prefill_plan(lengths: list[int], block_size: int) -> Plan:
    sampling = ResolvedSampling(top_k=50, top_p=0.9, min_p=0.01)
    rows = len(lengths)
    slots = np.arange(rows, dtype=np.int32)
    counts = np.array(lengths, np.int32)
    blocks = -(-counts // block_size)
    return Plan(
        step=0,
        seq_ids=slots.astype(np.int64),
        slots=slots,
        starts=np.zeros(rows, np.int32),
        num_tokens=counts,
        samples=np.ones(rows, np.bool_),
        num_decodes=0,
        prefill_token_ids=np.zeros(counts.sum(), np.int32),
        admissions=tuple(Admission(slot=i, seq_id=i, row=i, sample=0, sampling=sampling) for i in range(rows)),
        table_slots=np.repeat(slots, blocks),
        table_columns=np.concatenate([np.arange(count, dtype=np.int32) for count in blocks]),
        table_blocks=np.arange(blocks.sum(), dtype=np.int32),
    )
