"""Runs plans on one device: plan -> packed tensors -> model -> sampled tokens."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.layers.attention import AttentionMeta, AttentionRows
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.runner.batch import BlockTables, PackedBatch, apart, pack, split_evenly
from nanovllm.runner.device_state import DeviceState
from nanovllm.runner.graph_sizes import GraphSizes
from nanovllm.runner.memory import device_memory
from nanovllm.runner.sampling_table import settings_rows
from nanovllm.runner.step_graphs import StepGraphs, StepShape
from nanovllm.runner.uploads import FixedInputs, Padding, Uploader

if TYPE_CHECKING:
    from kernels.attention_work import DecodeWork
    from nanovllm.runner.attention_work import AttentionWork
    from nanovllm.runner.halves import Halves


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    token_ids: tuple[np.ndarray, ...]
    """In parts, on the host once `done` has happened."""
    started: "torch.cuda.Event | None"
    done: "torch.cuda.Event | None"
    forward_ms: float
    prepare_ms: float
    shape: StepShape | None
    """Of the graph that ran, if one did."""
    num_rows: int
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
        work: "AttentionWork | None" = None,
        graph_sizes: GraphSizes | None = None,
        capture: bool = True,
    ) -> None:
        """`kv_cache`: [layers, 2, blocks, KV heads, block size, head size], on the model's device.

        `work` shares out attention for the Triton kernels, None where others compute it. Steps run at the fixed
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
        # What pads a step's tokens and rows of logits.
        self._fills = {
            "input_ids": -1 - self._state.spare_slot,
            "positions": 0,
            "slot_mapping": -1,
            "sample_slots": self._state.spare_slot,
            "sample_positions": 0,
        }
        self._halves = _halves(self.device) if graph_sizes is not None and graph_sizes.in_halves else None
        self.graphs: StepGraphs | None = None
        if graph_sizes is not None:
            with torch.inference_mode():
                self.graphs = StepGraphs(
                    self._fixed_step,
                    self._fixed_inputs,
                    graph_sizes,
                    finds_prefixes=work is not None and work.finds_prefixes,
                    capture=capture,
                    may_cut=work is not None,
                )

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        began = time.perf_counter()
        self._tables.update(plan)
        prefills = plan.num_decodes < plan.num_rows
        if self.graphs is None or not self.graphs.has_shapes(prefills=prefills):
            batch = pack(plan, self._tables, self._block_size, self._multiple)
            self._run_at_own_size(plan, batch, began)
            return
        batch = pack(plan, self._tables, self._block_size, 1)
        shape = self.graphs.shape(
            batch.num_tokens,
            batch.num_sampled,
            prefills=prefills,
            shares_prefixes=self._shares_prefixes(plan, batch),
            context_tokens=int(batch.context_lens.sum()),
        )
        self._run_at_shape(self.graphs, shape, plan, batch, began)

    def collect(self) -> StepResult:
        step = self._launched.popleft()
        forward_ms = step.forward_ms
        if step.done is not None and step.started is not None:
            step.done.synchronize()
            forward_ms = step.started.elapsed_time(step.done)
        if self._memory is None or self.device.type != "cuda":
            self._memory = device_memory(self.device)
        allocated, reserved = self._memory
        shape = step.shape
        return StepResult(
            token_ids=np.concatenate(step.token_ids),
            prepare_ms=step.prepare_ms,
            forward_ms=forward_ms,
            padded_batch_size=step.num_rows if shape is None or shape.prefills else shape.num_tokens,
            padded_tokens=0 if shape is None else shape.num_tokens,
            cuda_graph=shape is not None,
            in_halves=shape is not None and shape.in_halves,
            logits_rows=step.logits_rows,
            device_allocated_bytes=allocated,
            device_reserved_bytes=reserved,
        )

    # Launching

    def _run_at_shape(
        self,
        graphs: StepGraphs,
        shape: StepShape,
        plan: Plan,
        batch: PackedBatch,
        began: float,
    ) -> None:
        rows, half = batch.num_sampled, shape.num_tokens // 2
        split = split_evenly(batch.context_lens, half) if shape.in_halves else None
        arrays = self._arrays(plan, batch, split)
        if split is not None:
            arrays |= {name: apart(arrays[name], split, half, fill) for name, fill in self._fills.items()}
        if not shape.prefills and not any(len(arrays.get(name, ())) for name in ("merges", "second_merges")):
            shape = graphs.without_cuts(shape)
        if shape.prefills:
            # New tables and settings come in any number: they are entered before the step.
            self._memory = None
            entered = {name: arrays.pop(name) for name in _ENTERED if name in arrays}
            self._enter(self._uploader.send(entered))
        else:
            del arrays["logits_index"]  # every token samples
        for name in _BY_ROWS:
            arrays.pop(name, None)
        graphs.send(shape, arrays)
        prepared = time.perf_counter()
        started = self._mark(0)
        tokens = graphs.run(shape)
        parts = (slice(rows),) if split is None else (slice(split), slice(half, half + rows - split))
        self._launch(tokens, parts, started, began, prepared, plan.num_rows, logits_rows=len(tokens), shape=shape)

    def _run_at_own_size(self, plan: Plan, batch: PackedBatch, began: float) -> None:
        self._shares_prefixes(plan, batch)
        inputs = self._uploader.send(self._arrays(plan, batch))
        prepared = time.perf_counter()
        started = self._mark(0)
        self._enter(inputs)
        tokens = self._step(inputs, self._own_meta(plan, batch, inputs), batch.num_sampled)
        self._memory = None
        parts = (slice(len(tokens)),)
        logits_rows = len(batch.logits_index)
        self._launch(tokens, parts, started, began, prepared, plan.num_rows, logits_rows=logits_rows, shape=None)

    def _launch(
        self,
        tokens: Tensor,
        parts: tuple[slice, ...],
        started: "torch.cuda.Event | None",
        began: float,
        prepared: float,
        num_rows: int,
        *,
        logits_rows: int,
        shape: StepShape | None,
    ) -> None:
        """Send the tokens on their way to the host; `parts` of them are the rows', the rest is padding."""
        end = parts[-1].stop
        buffer = self._token_buffers[self._num_submitted % self._depth][:end]
        buffer.copy_(tokens[:end], non_blocking=True)
        done = self._mark(1)
        self._num_submitted += 1
        now = time.perf_counter()
        self._launched.append(
            _Launched(
                token_ids=tuple(buffer.numpy()[part] for part in parts),
                started=started,
                done=done,
                forward_ms=(now - prepared) * 1e3,
                prepare_ms=((now if done is not None else prepared) - began) * 1e3,
                shape=shape,
                num_rows=num_rows,
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

    def _enter(self, inputs: Mapping[str, Tensor]) -> None:
        """Block table entries, and the sampling of sequences that take a slot."""
        self._state.update_tables(inputs["table_places"], inputs["table_blocks"])
        if "settings" in inputs:
            self._state.sampling.enter(inputs["admitted_slots"], inputs["settings"])

    def _fixed_step(self, inputs: Mapping[str, Tensor], shape: StepShape) -> Tensor:
        """A whole step over inputs of that shape: tokens int32 [num_sampled]."""
        if not shape.prefills:
            self._state.update_tables(inputs["table_places"], inputs["table_blocks"])
        if shape.in_halves:
            return self._sample(self._run_in_halves(inputs, shape), inputs)
        rows = decode_work = prefill_work = None
        if self._work is None:
            rows = AttentionRows(
                num_decodes=shape.num_tokens,
                slots=inputs["sample_slots"],
                context_lens=inputs["sample_positions"],  # the sampled token comes right behind the context
                width=self._state.block_tables.shape[1],
                query_lens=[],
                prefill_context_lens=[],
                query_starts=None,
            )
        else:
            decode_work = self._work.decode_work(
                inputs, shares_prefixes=shape.shares_prefixes, cuts_rows=shape.cuts_rows
            )
            prefill_work = self._work.prefill_work(inputs) if shape.prefills else None
        meta = AttentionMeta(
            kv_cache=self._kv_cache,
            block_tables=self._state.block_tables,
            slot_mapping=inputs["slot_mapping"],
            rows=rows,
            decode_work=decode_work,
            prefill_work=prefill_work,
        )
        return self._step(inputs, meta, shape.num_sampled)

    def _step(self, inputs: Mapping[str, Tensor], meta: AttentionMeta, num_sampled: int) -> Tensor:
        """int32 [num_sampled]; the slots remember what they sampled."""
        tokens = inputs["input_ids"], self._state.last_tokens
        hidden = self._model(tokens, inputs["positions"], meta, inputs.get("logits_index"))
        if not num_sampled:  # of no row is this the last chunk; its keys and values are stored all the same
            return torch.empty(0, dtype=torch.int32, device=self.device)
        return self._sample(hidden, inputs)

    def _run_in_halves(self, inputs: Mapping[str, Tensor], shape: StepShape) -> Tensor:
        """Hidden states [num_tokens, D]."""
        assert self._work is not None
        assert self._halves is not None
        half = shape.num_tokens // 2
        first, second = self._work.halves(inputs, cuts_rows=shape.cuts_rows)

        def run(rows: slice, work: "DecodeWork") -> Tensor:
            meta = AttentionMeta(
                kv_cache=self._kv_cache,
                block_tables=self._state.block_tables,
                slot_mapping=inputs["slot_mapping"][rows],
                decode_work=work,
            )
            tokens = inputs["input_ids"][rows], self._state.last_tokens
            return self._model(tokens, inputs["positions"][rows], meta)

        return self._halves.run(lambda: run(slice(None, half), first), lambda: run(slice(half, None), second))

    def _sample(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """int32 [rows that sample] of hidden states [those, perhaps padded, D]."""
        draws = self._state.sampling.draws(inputs["sample_slots"], inputs["sample_positions"])
        return self._model.sample(hidden, draws, self._state.last_tokens).to(torch.int32)

    def _own_meta(self, plan: Plan, batch: PackedBatch, inputs: Mapping[str, Tensor]) -> AttentionMeta:
        decodes = plan.num_decodes
        prefills = decodes < plan.num_rows
        rows = decode_work = prefill_work = None
        if self._work is None:
            rows = AttentionRows(
                num_decodes=decodes,
                slots=inputs["slots"],
                context_lens=inputs["context_lens"],
                width=batch.width,
                query_lens=plan.num_tokens[decodes:].tolist(),
                prefill_context_lens=batch.context_lens[decodes:].tolist(),
                query_starts=inputs["query_starts"],
            )
        else:
            shares_prefixes = len(inputs.get("prefix_items", ())) > 0
            decode_work = self._work.decode_work(inputs, shares_prefixes=shares_prefixes) if decodes else None
            prefill_work = self._work.prefill_work(inputs) if prefills else None
        return AttentionMeta(
            kv_cache=self._kv_cache,
            block_tables=self._state.block_tables,
            slot_mapping=inputs["slot_mapping"],
            rows=rows,
            decode_work=decode_work,
            prefill_work=prefill_work,
        )

    # What the host prepares

    def _shares_prefixes(self, plan: Plan, batch: PackedBatch) -> bool:
        work = self._work
        return work is not None and work.find_prefixes(plan, self._tables.array, batch.context_lens)

    def _arrays(self, plan: Plan, batch: PackedBatch, split: int | None = None) -> dict[str, np.ndarray]:
        """Everything that the step's kernels read, by name; of a step in halves, whose second one begins at `split`."""
        width = self._tables.array.shape[1]
        arrays = {
            "table_places": plan.table_slots.astype(np.int64) * width + plan.table_columns,
            "table_blocks": plan.table_blocks,
            "input_ids": batch.input_ids,
            "positions": batch.positions,
            "slot_mapping": batch.slot_mapping,
            "logits_index": batch.logits_index,
            "sample_slots": batch.sample_slots.astype(np.int64),
            "sample_positions": batch.sample_positions,
        }
        if plan.admissions:
            arrays["admitted_slots"] = np.array([admission.slot for admission in plan.admissions], np.int64)
            arrays["settings"] = settings_rows(plan.admissions)
        if self._work is not None:
            return arrays | self._work.arrays(plan, batch.context_lens, split)
        counts = plan.num_tokens[plan.num_decodes :]
        return arrays | {
            "slots": plan.slots.astype(np.int64),
            "context_lens": batch.context_lens,
            "query_starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        }

    def _fixed_inputs(self, shape: StepShape) -> FixedInputs:
        state, fills = self._state, self._fills
        inputs = {
            "input_ids": Padding(np.int64, (shape.num_tokens,), fills["input_ids"]),
            "positions": Padding(np.int64, (shape.num_tokens,), fills["positions"]),
            "slot_mapping": Padding(np.int64, (shape.num_tokens,), fills["slot_mapping"]),
            "sample_slots": Padding(np.int64, (shape.num_sampled,), fills["sample_slots"]),
            "sample_positions": Padding(np.int32, (shape.num_sampled,), fills["sample_positions"]),
        }
        if shape.prefills:
            inputs["logits_index"] = Padding(np.int64, (shape.num_sampled,), 0)
        else:
            inputs["table_places"] = Padding(np.int64, (shape.num_tokens,), state.spare_entry)
            inputs["table_blocks"] = Padding(np.int32, (shape.num_tokens,), 0)
        if self._work is not None:
            inputs |= self._work.fixed_inputs(shape)
        return FixedInputs(inputs, self.device, self._depth)


_ENTERED = ("table_places", "table_blocks", "admitted_slots", "settings")
_BY_ROWS = ("slots", "context_lens", "query_starts")
"""What only steps at their own size need, of backends that go by rows."""


def _halves(device: torch.device) -> "Halves":
    from nanovllm.runner.halves import Halves  # of kernels that need triton

    return Halves(device)


def _event_pair() -> "tuple[torch.cuda.Event, torch.cuda.Event]":
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
