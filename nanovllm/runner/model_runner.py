"""Runs plans on one device: plan -> packed tensors -> model -> sampled tokens."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.layers.attention import AttentionMeta, PrefillMeta
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.runner.attention_work import AttentionWork
from nanovllm.runner.batch import BlockTables, PackedBatch, pack
from nanovllm.runner.decode_graphs import DecodeGraphs
from nanovllm.runner.device_state import DeviceState
from nanovllm.runner.memory import device_memory
from nanovllm.runner.sampling_table import settings_rows
from nanovllm.runner.uploads import FixedInputs, Padding, Uploader


@dataclass(frozen=True, slots=True)
class _Launched:
    token_ids: np.ndarray
    """On the host once `done` has happened."""
    started: "torch.cuda.Event | None"
    done: "torch.cuda.Event | None"
    forward_ms: float
    prepare_ms: float
    padded_batch_size: int
    cuda_graph: bool
    logits_rows: int


def row_multiple(device: torch.device) -> int:
    """What packed tokens and rows of logits are padded to a multiple of."""
    return reference.ROW_MULTIPLE if device.type == "cpu" else 1


class ModelRunner:
    """A Runner over one device. On a GPU, `submit` launches and returns; on a CPU the step has run when it does."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        kv_cache: Tensor,
        *,
        max_num_seqs: int,
        max_model_len: int,
        work: AttentionWork | None = None,
        graph_sizes: list[int] | None = None,
        capture: bool = True,
    ) -> None:
        """`kv_cache`: [layers, 2, blocks, KV heads, block size, head size], on the model's device.

        `work` shares out attention for the Triton kernels, None where others compute it. Decode steps run at the fixed
        `graph_sizes`, as CUDA graphs if `capture`, which are captured here; None runs every step at its own size.
        """
        self.device = kv_cache.device
        self.lookahead = 1 if self.device.type == "cuda" else 0
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.shape[4]
        self._multiple = row_multiple(self.device)
        max_blocks = -(-max_model_len // self._block_size)
        self._tables = BlockTables(max_num_seqs, max_blocks)
        self._state = DeviceState(max_num_seqs, max_blocks, self.device)
        self._work = work
        self._depth = self.lookahead + 1
        self._uploader = Uploader(self.device, self._depth)
        on_gpu = self.device.type == "cuda"
        self._token_buffers = [
            torch.empty(max_num_seqs, dtype=torch.int32, pin_memory=on_gpu) for _ in range(self._depth)
        ]
        self._events = [_event_pair() for _ in range(self._depth)] if on_gpu else []
        self._num_submitted = 0
        self._launched: deque[_Launched] = deque()
        self._memory: tuple[int, int] | None = None
        self.graphs: DecodeGraphs | None = None
        if graph_sizes is not None:
            with torch.inference_mode():
                self.graphs = DecodeGraphs(
                    self._decode_step,
                    self._fixed_inputs,
                    graph_sizes,
                    with_prefixes=work is not None and work.finds_prefixes,
                    capture=capture,
                )

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        began = time.perf_counter()
        self._tables.update(plan)
        has_fixed_size = plan.num_decodes == plan.num_rows and self.graphs is not None
        batch = pack(plan, self._tables, self._block_size, 1 if has_fixed_size else self._multiple)
        arrays = self._arrays(plan, batch)
        if has_fixed_size:
            self._submit_graph(plan, arrays, began)
        else:
            self._submit_eager(plan, batch, arrays, began)

    def collect(self) -> StepResult:
        step = self._launched.popleft()
        forward_ms = step.forward_ms
        if step.done is not None and step.started is not None:
            step.done.synchronize()
            forward_ms = step.started.elapsed_time(step.done)
        if self._memory is None or self.device.type != "cuda":
            self._memory = device_memory(self.device)
        allocated, reserved = self._memory
        return StepResult(
            token_ids=step.token_ids.copy(),
            prepare_ms=step.prepare_ms,
            forward_ms=forward_ms,
            padded_batch_size=step.padded_batch_size,
            cuda_graph=step.cuda_graph,
            logits_rows=step.logits_rows,
            device_allocated_bytes=allocated,
            device_reserved_bytes=reserved,
        )

    # Launching

    def _submit_graph(self, plan: Plan, arrays: dict[str, np.ndarray], began: float) -> None:
        assert self.graphs is not None
        self.graphs.send(plan.num_rows, arrays)
        prepared = time.perf_counter()
        started = self._mark(0)
        tokens = self.graphs.run(plan.num_rows, len(arrays.get("prefix_items", ())) > 0)
        size = self.graphs.size_for(plan.num_rows)
        self._launch(tokens, started, began, prepared, padded_rows=size, logits_rows=size, cuda_graph=True)

    def _submit_eager(self, plan: Plan, batch: PackedBatch, arrays: dict[str, np.ndarray], began: float) -> None:
        inputs = self._uploader.send(arrays)
        prepared = time.perf_counter()
        started = self._mark(0)
        tokens = self._eager_step(plan, batch, inputs)
        self._memory = None
        logits_rows = len(batch.logits_index)
        self._launch(tokens, started, began, prepared, padded_rows=plan.num_rows, logits_rows=logits_rows)

    def _launch(
        self,
        tokens: Tensor,
        started: "torch.cuda.Event | None",
        began: float,
        prepared: float,
        *,
        padded_rows: int,
        logits_rows: int,
        cuda_graph: bool = False,
    ) -> None:
        """Send the tokens on their way to the host."""
        buffer = self._token_buffers[self._num_submitted % self._depth][: len(tokens)]
        buffer.copy_(tokens, non_blocking=True)
        done = self._mark(1)
        self._num_submitted += 1
        now = time.perf_counter()
        self._launched.append(
            _Launched(
                token_ids=buffer.numpy(),
                started=started,
                done=done,
                forward_ms=(now - prepared) * 1e3,
                prepare_ms=((now if done is not None else prepared) - began) * 1e3,
                padded_batch_size=padded_rows,
                cuda_graph=cuda_graph,
                logits_rows=logits_rows,
            )
        )

    def _mark(self, which: int) -> "torch.cuda.Event | None":
        if not self._events:
            return None
        event = self._events[self._num_submitted % self._depth][which]
        event.record()
        return event

    # What the device does

    def _decode_step(self, inputs: Mapping[str, Tensor], shares_prefixes: bool) -> Tensor:
        """A whole decode step over fixed inputs: tokens int32 [size]."""
        self._state.update(inputs)
        slots, context_lens = inputs["slots"], inputs["context_lens"]
        meta = self._meta(inputs, len(slots), self._state.block_tables.shape[1], shares_prefixes, None)
        input_ids = self._state.last_tokens.index_select(0, slots)
        hidden = self._model(input_ids, inputs["positions"], meta)
        tokens = self._sample(hidden, slots, context_lens)
        self._state.keep_tokens(slots, tokens)
        return tokens

    def _eager_step(self, plan: Plan, batch: PackedBatch, inputs: Mapping[str, Tensor]) -> Tensor:
        """Any plan, at its own size: tokens int32 [rows that sample]."""
        self._state.update(inputs)
        if plan.admissions:
            self._state.sampling.enter(inputs["admitted_slots"], inputs["settings"])
        decodes = plan.num_decodes
        slots, input_ids = inputs["slots"], inputs["input_ids"]
        if decodes:
            input_ids[:decodes] = self._state.last_tokens.index_select(0, slots[:decodes])
        prefill = None if decodes == plan.num_rows else _prefill_meta(plan, batch, inputs)
        shares_prefixes = len(inputs.get("prefix_items", ())) > 0
        meta = self._meta(inputs, decodes, batch.width, shares_prefixes, prefill)
        hidden = self._model(input_ids, inputs["positions"], meta, inputs["logits_index"])
        if not batch.num_sampled:
            return torch.empty(0, dtype=torch.int32, device=self.device)
        sampled_slots = inputs["sample_slots"]
        tokens = self._sample(hidden, sampled_slots, inputs["sample_positions"])
        self._state.keep_tokens(sampled_slots, tokens)
        return tokens

    def _sample(self, hidden: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """int32 [slots] from the first rows of `hidden`, which may be padded."""
        logits = self._model.compute_logits(hidden)[: len(slots)]
        return self._model.ops.sample(logits, self._state.sampling.draws(slots, positions)).to(torch.int32)

    def _meta(
        self,
        inputs: Mapping[str, Tensor],
        num_decodes: int,
        width: int,
        shares_prefixes: bool,
        prefill: PrefillMeta | None,
    ) -> AttentionMeta:
        work = None
        if self._work is not None and num_decodes:
            work = self._work.on_device(inputs, shares_prefixes)
        return AttentionMeta(
            kv_cache=self._kv_cache,
            block_tables=self._state.block_tables,
            slot_mapping=inputs["slot_mapping"],
            num_decodes=num_decodes,
            decode_slots=inputs["slots"][:num_decodes],
            decode_context_lens=inputs["context_lens"][:num_decodes],
            decode_width=width,
            work=work,
            prefill=prefill,
        )

    # What the host prepares

    def _arrays(self, plan: Plan, batch: PackedBatch) -> dict[str, np.ndarray]:
        """Everything that the step's kernels read, by name."""
        width = self._tables.array.shape[1]
        arrays = {
            "table_places": plan.table_slots.astype(np.int64) * width + plan.table_columns,
            "table_blocks": plan.table_blocks,
            "slots": plan.slots.astype(np.int64),
            "positions": batch.positions,
            "slot_mapping": batch.slot_mapping,
            "context_lens": batch.context_lens,
        }
        decodes = plan.num_decodes
        if decodes < plan.num_rows or self.graphs is None:
            arrays |= {
                "input_ids": batch.input_ids,
                "logits_index": batch.logits_index,
                "sample_slots": batch.sample_slots.astype(np.int64),
                "sample_positions": batch.sample_positions,
            }
        if plan.admissions:
            arrays["admitted_slots"] = np.array([admission.slot for admission in plan.admissions], np.int64)
            arrays["settings"] = settings_rows(plan.admissions)
        if decodes < plan.num_rows:
            counts = plan.num_tokens[decodes:]
            arrays["query_starts"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            if self._work is not None:
                arrays["prefill_items"] = self._work.prefill_items(plan)
        if self._work is not None and decodes:
            arrays |= self._work.decode_arrays(plan, self._tables.array, batch.context_lens[:decodes])
        return arrays

    def _fixed_inputs(self, rows: int) -> FixedInputs:
        inputs = {
            "table_places": Padding(np.int64, (rows,), self._state.spare_entry),
            "table_blocks": Padding(np.int32, (rows,), 0),
            "slots": Padding(np.int64, (rows,), self._state.spare_slot),
            "positions": Padding(np.int64, (rows,), 0),
            "slot_mapping": Padding(np.int64, (rows,), -1),
            "context_lens": Padding(np.int32, (rows,), 0),
        }
        if self._work is not None:
            inputs |= self._work.fixed_inputs(rows)
        return FixedInputs(inputs, self.device, self._depth)


def _prefill_meta(plan: Plan, batch: PackedBatch, inputs: Mapping[str, Tensor]) -> PrefillMeta:
    decodes = plan.num_decodes
    return PrefillMeta(
        slots=inputs["slots"][decodes:],
        query_lens=plan.num_tokens[decodes:].tolist(),
        context_lens=batch.context_lens[decodes:].tolist(),
        items=inputs.get("prefill_items"),
        query_starts=inputs["query_starts"],
        context_lens_tensor=inputs["context_lens"][decodes:],
    )


def _event_pair() -> "tuple[torch.cuda.Event, torch.cuda.Event]":
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
