"""How much memory is left for the KV cache beside the largest step that can ever run."""

import numpy as np
import torch

from nanovllm.config import LLMConfig
from nanovllm.engine.plan import Admission, Plan
from nanovllm.models.model_config import Qwen3Config
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.runner.kv_cache import allocate
from nanovllm.runner.memory import free_host_memory
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling_params import ResolvedSampling


def available_kv_bytes(
    model: Qwen3ForCausalLM,
    c: Qwen3Config,
    config: LLMConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> int:
    """Free bytes of a GPU less what its largest step needs, by running that step once; on a CPU, free memory."""
    if device.type != "cuda":
        return free_host_memory()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _run_largest_steps(model, c, config, dtype, device, max_model_len)
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free - needed


def _run_largest_steps(
    model: Qwen3ForCausalLM,
    c: Qwen3Config,
    config: LLMConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> None:
    """A full prefill of few long rows, then one of as many rows as may run, each sampling with every filter on."""
    budget, most = config.engine.max_num_batched_tokens, config.engine.max_num_seqs
    for length in {min(budget, max_model_len), max(1, budget // most)}:
        rows = min(most, budget // length)
        blocks_per_row = -(-length // config.kv.block_size)
        kv_cache = allocate(c, rows * blocks_per_row, config.kv.block_size, dtype, device)
        runner = ModelRunner(model, kv_cache, max_num_seqs=rows, max_model_len=max_model_len)
        runner.submit(_prefill_plan(rows, length, blocks_per_row))
        runner.collect()
        del kv_cache, runner


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
