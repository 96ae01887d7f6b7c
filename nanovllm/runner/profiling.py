"""How much memory is left for the KV cache beside the largest steps that can ever run."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import LLMConfig
from nanovllm.engine.plan import Admission, Plan
from nanovllm.models.model_config import Qwen3Config
from nanovllm.runner.kv_cache import allocate
from nanovllm.runner.memory import free_host_memory
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.step_graphs import GraphSizes
from nanovllm.sampling_params import ResolvedSampling

GRAPH_BYTES = 8 * 2**20
"""What a captured graph takes beside the memory that graphs share, at most."""


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
    budget, most = config.engine.max_num_batched_tokens, config.engine.max_num_seqs
    blocks = most * -(-max(1, budget // most) // config.kv.block_size) + -(-budget // config.kv.block_size)
    kv_cache = allocate(c, blocks, config.kv.block_size, dtype, device)
    before = _free(device)
    runner = make_runner(kv_cache, graph_sizes and graph_sizes.largest())
    standing = max(before - _free(device), 0) + GRAPH_BYTES * (graph_sizes.most_graphs() if graph_sizes else 0)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    for length in {min(budget, max_model_len - 1), max(1, min(budget // most, max_model_len - 1))}:
        rows = min(most, budget // length)
        runner.submit(_prefill_plan(rows, length, -(-length // config.kv.block_size)))
        runner.collect()
    working = torch.cuda.max_memory_allocated(device) - allocated
    del kv_cache, runner
    return _free(device) - standing - working


def _free(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _prefill_plan(rows: int, length: int, blocks_per_row: int) -> Plan:
    sampling = ResolvedSampling(top_k=50, top_p=0.9, min_p=0.01)
    slots = np.arange(rows, dtype=np.int32)
    return Plan(
        step=0,
        seq_ids=slots.astype(np.int64),
        slots=slots,
        starts=np.zeros(rows, np.int32),
        num_tokens=np.full(rows, length, np.int32),
        samples=np.ones(rows, np.bool_),
        num_decodes=0,
        prefill_token_ids=np.zeros(rows * length, np.int32),
        admissions=tuple(Admission(slot=i, seq_id=i, row=i, sample=0, sampling=sampling) for i in range(rows)),
        table_slots=np.repeat(slots, blocks_per_row),
        table_columns=np.tile(np.arange(blocks_per_row, dtype=np.int32), rows),
        table_blocks=np.arange(rows * blocks_per_row, dtype=np.int32),
    )
