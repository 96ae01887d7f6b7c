"""Runs plans on one device: plan -> packed tensors -> model -> sampled tokens."""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.layers.attention import AttentionMeta
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.runner.batch import BlockTables, PackedBatch, pack
from nanovllm.runner.memory import device_memory
from nanovllm.runner.sampler import Sampler


@dataclass(frozen=True, slots=True)
class _Launched:
    token_ids: Tensor
    """On the host once `done` has happened."""
    done: "torch.cuda.Event | None"
    started: "torch.cuda.Event | None"
    forward_ms: float
    prepare_ms: float
    num_rows: int
    logits_rows: int


def row_multiple(device: torch.device) -> int:
    """What packed tokens and rows of logits are padded to a multiple of."""
    return reference.ROW_MULTIPLE if device.type == "cpu" else 1


class ModelRunner:
    """A Runner over one device. On a GPU, `submit` launches and returns; on a CPU the step has run when it does."""

    def __init__(self, model: Qwen3ForCausalLM, kv_cache: Tensor, *, max_num_seqs: int, max_model_len: int) -> None:
        """`kv_cache`: [layers, 2, blocks, block size, KV heads, head size], on the model's device."""
        self.device = kv_cache.device
        self.lookahead = 1 if self.device.type == "cuda" else 0
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.shape[3]
        self._multiple = row_multiple(self.device)
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // self._block_size))
        self._sampler = Sampler(max_num_seqs, self.device)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self._launched: deque[_Launched] = deque()

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        began = time.perf_counter()
        self._tables.update(plan)
        self._sampler.admit(plan.admissions)
        batch = pack(plan, self._tables, self._block_size, self._multiple)
        meta = self._attention_meta(plan, batch)
        input_ids = self._to_device(batch.input_ids)
        positions = self._to_device(batch.positions)
        decodes = plan.num_decodes
        if decodes:
            input_ids[:decodes] = self._last_tokens[self._to_device(plan.slots[:decodes])]
        launch_at = time.perf_counter()
        started = self._mark()
        hidden = self._model(input_ids, positions, meta)
        token_ids, logits_rows = self._sample(hidden, batch)
        self._launched.append(
            _Launched(
                token_ids=token_ids,
                done=self._mark(),
                started=started,
                forward_ms=(time.perf_counter() - launch_at) * 1e3,
                prepare_ms=((time.perf_counter() if self.device.type == "cuda" else launch_at) - began) * 1e3,
                num_rows=plan.num_rows,
                logits_rows=logits_rows,
            )
        )

    def collect(self) -> StepResult:
        step = self._launched.popleft()
        forward_ms = step.forward_ms
        if step.done is not None and step.started is not None:
            step.done.synchronize()
            forward_ms = step.started.elapsed_time(step.done)
        allocated, reserved = device_memory(self.device)
        return StepResult(
            token_ids=step.token_ids.numpy().astype(np.int32),
            prepare_ms=step.prepare_ms,
            forward_ms=forward_ms,
            padded_batch_size=step.num_rows,
            logits_rows=step.logits_rows,
            device_allocated_bytes=allocated,
            device_reserved_bytes=reserved,
        )

    def _attention_meta(self, plan: Plan, batch: PackedBatch) -> AttentionMeta:
        decodes = plan.num_decodes
        return AttentionMeta(
            kv_cache=self._kv_cache,
            slot_mapping=self._to_device(batch.slot_mapping),
            num_decodes=decodes,
            decode_block_tables=self._to_device(self._narrow(batch, slice(0, decodes))),
            decode_context_lens=self._to_device(batch.context_lens[:decodes]),
            prefill_block_tables=self._to_device(batch.block_tables[decodes:]),
            prefill_query_lens=plan.num_tokens[decodes:].tolist(),
            prefill_context_lens=batch.context_lens[decodes:].tolist(),
        )

    def _narrow(self, batch: PackedBatch, rows: slice) -> np.ndarray:
        """Those rows' block tables, no wider than the longest of them needs."""
        if rows.stop == 0:
            return batch.block_tables[:0]
        width = -(-int(batch.context_lens[rows].max()) // self._block_size)
        return batch.block_tables[rows, :width]

    def _sample(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, int]:
        """Sampled tokens on their way to the host, and how many rows of logits were computed."""
        if not batch.num_sampled:
            return torch.empty(0, dtype=torch.int64), 0
        logits = self._model.compute_logits(hidden[self._to_device(batch.logits_index)])
        tokens = self._sampler.draw(logits[: batch.num_sampled], batch.sample_slots, batch.sample_positions)
        # A failed row's -1 must not become an index; the scheduler drops whatever comes of it.
        self._last_tokens[self._to_device(batch.sample_slots)] = tokens.clamp(min=0)
        return tokens.to("cpu", non_blocking=True), len(logits)

    def _mark(self) -> "torch.cuda.Event | None":
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)
