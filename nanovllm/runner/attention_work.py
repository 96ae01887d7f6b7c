"""Prepares a step's attention for the Triton kernels, on the host and on the device."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kernels.attention_work import ITEM_FIELDS, LONG_ITEM_KEYS, DecodeWork, PrefillWork
from kernels.launch import num_programs
from kernels.paged_decode_attention import PROGRAMS_BESIDE
from kernels.paged_prefill_attention import tokens_per_item
from kernels.shared_prefix_attention import members_per_item
from nanovllm.engine.plan import Plan
from nanovllm.models.model_config import Qwen3Config
from nanovllm.runner.batch import prefill_items
from nanovllm.runner.decode_work import PROGRAMS_PER_SM, WorkLimits, share_out
from nanovllm.runner.graph_sizes import MAX_HALVES_ROWS
from nanovllm.runner.shared_prefixes import PrefixGroup, find_groups
from nanovllm.runner.step_graphs import StepShape
from nanovllm.runner.uploads import Padding

_COUNTS = range(8)
_ITEMS, _MERGES, _PREFIX_ITEMS, _SECOND_ITEMS, _SECOND_MERGES = _COUNTS[:5]
"""Where `work_counts` says how many there are of each; the last two are a second half's."""
_PREFILL_BOUNDS = slice(5, 8)
"""And where it has PrefillWork's bounds."""


class AttentionWork:
    """Knows the batch's shared prefixes from step to step, and owns the scratch of partial results."""

    def __init__(
        self,
        c: Qwen3Config,
        dtype: torch.dtype,
        device: torch.device,
        *,
        block_size: int,
        max_num_seqs: int,
        finds_prefixes: bool,
    ) -> None:
        """`finds_prefixes`: rows can share blocks, and prefixes that many rows share are to be read once."""
        group = c.num_attention_heads // c.num_key_value_heads
        self.finds_prefixes = finds_prefixes
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._num_layers = c.num_hidden_layers
        self._tokens_per_item = tokens_per_item(dtype, c.head_dim, group)
        self._limits = WorkLimits(
            num_kv_heads=c.num_key_value_heads,
            num_programs=num_programs(device) * PROGRAMS_PER_SM,
            num_prefix_programs=num_programs(device),
            members_per_item=members_per_item(dtype, c.head_dim, group),
        )
        self._half_limits = replace(self._limits, num_programs=num_programs(device) * PROGRAMS_BESIDE, beside=True)
        # Halves share no prefixes: each has as many partials as items, at most.
        self._partials_of_half = self._half_limits.items(min(max_num_seqs, MAX_HALVES_ROWS) // 2)
        num_partials = self._limits.partials(max_num_seqs)
        assert 2 * self._partials_of_half <= num_partials
        shape = (num_partials, c.num_attention_heads, c.head_dim)
        self._partial_out = torch.empty(shape, dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
        self._seq_ids = np.empty(0, np.int64)
        self._groups: list[PrefixGroup] = []

    def find_prefixes(self, plan: Plan, tables: np.ndarray, context_lens: np.ndarray) -> bool:
        """Whether rows of the plan share a prefix that is to be read once; `tables` are all slots'. Before `arrays`."""
        decodes = plan.num_decodes
        if self.finds_prefixes and decodes:
            self._find_prefixes(plan.seq_ids[:decodes], plan.slots[:decodes], tables, context_lens[:decodes])
        return decodes > 0 and bool(self._groups)

    def arrays(self, plan: Plan, context_lens: np.ndarray, split: int | None = None) -> dict[str, np.ndarray]:
        """The plan's work lists, in halves if the second one begins at row `split`; `context_lens` are the rows'."""
        decodes = plan.num_decodes
        counts = np.zeros(len(_COUNTS), np.int32)
        # Of the decode kernel, then of the prefill kernel or the second half, one for each layer.
        arrays = {"work_counts": counts, "counters": np.zeros(2 * self._num_layers, np.int32)}
        if split is not None:
            first, second = (
                share_out(plan.slots[rows], context_lens[rows], [], self._block_size, self._half_limits)
                for rows in (slice(None, split), slice(split, None))
            )
            counts[_ITEMS], counts[_MERGES] = len(first.items), len(first.merges)
            counts[_SECOND_ITEMS], counts[_SECOND_MERGES] = len(second.items), len(second.merges)
            lists = {"merges": first.merges, "items": first.items}
            return arrays | lists | {"second_merges": second.merges, "second_items": second.items}
        if decodes < plan.num_rows:
            rows = slice(decodes, None)
            items = prefill_items(plan.num_tokens[rows], plan.starts[rows], plan.slots[rows], self._tokens_per_item)
            items[:, 0] += decodes
            counts[_PREFILL_BOUNDS] = 0, np.sum(items[:, 1] + items[:, 3] > LONG_ITEM_KEYS), len(items)
            arrays["prefill_items"] = items
        if decodes:
            slots, lens = plan.slots[:decodes], context_lens[:decodes]
            work = share_out(slots, lens, self._groups, self._block_size, self._limits)
            counts[_ITEMS], counts[_MERGES] = len(work.items), len(work.merges)
            counts[_PREFIX_ITEMS] = len(work.prefix_items)
            arrays |= {"merges": work.merges, "items": work.items}
            if len(work.prefix_items):
                arrays["prefix_items"] = work.prefix_items
                arrays["members"], arrays["member_partials"] = work.members, work.member_partials
        return arrays

    def decode_work(self, inputs: Mapping[str, Tensor], *, shares_prefixes: bool, cuts_rows: bool = True) -> DecodeWork:
        """The decode rows' part of `arrays`, on the device."""
        counts = inputs["work_counts"]
        return DecodeWork(
            items=inputs["items"],
            num_items=counts[_ITEMS:],
            counters=inputs["counters"],
            merges=inputs["merges"],
            num_merges=counts[_MERGES:],
            prefix_items=inputs.get("prefix_items", counts),
            num_prefix_items=counts[_PREFIX_ITEMS:],
            members=inputs.get("members", counts),
            member_partials=inputs.get("member_partials", counts),
            partial_out=self._partial_out,
            partial_lse=self._partial_lse,
            shares_prefixes=shares_prefixes,
            cuts_rows=cuts_rows,
        )

    def halves(self, inputs: Mapping[str, Tensor], *, cuts_rows: bool) -> tuple[DecodeWork, DecodeWork]:
        """Both halves' parts of `arrays`, on the device."""
        counts, scratch = inputs["work_counts"], self._partials_of_half
        first = self.decode_work(inputs, shares_prefixes=False, cuts_rows=cuts_rows)
        second = first._replace(
            items=inputs["second_items"],
            num_items=counts[_SECOND_ITEMS:],
            counters=inputs["counters"][self._num_layers :],
            merges=inputs["second_merges"],
            num_merges=counts[_SECOND_MERGES:],
            partial_out=self._partial_out[scratch:],
            partial_lse=self._partial_lse[scratch:],
        )
        return first, second

    def prefill_work(self, inputs: Mapping[str, Tensor]) -> PrefillWork:
        """The prefill rows' part of `arrays`, on the device."""
        bounds, counters = inputs["work_counts"][_PREFILL_BOUNDS], inputs["counters"][self._num_layers :]
        return PrefillWork(items=inputs["prefill_items"], bounds=bounds, counters=counters)

    def fixed_inputs(self, shape: StepShape) -> dict[str, Padding]:
        """Capacities for any step of the shape; the longest, items, last."""
        rows = min(shape.num_tokens, self._max_num_seqs)
        inputs = {
            "work_counts": Padding(np.int32, (len(_COUNTS),), 0),
            "counters": Padding(np.int32, (2 * self._num_layers,), 0),
            "merges": Padding(np.int32, (rows, 4), 0),
        }
        if shape.in_halves:
            half = rows // 2
            items = Padding(np.int32, (self._half_limits.items(half), ITEM_FIELDS), 0)
            merges = Padding(np.int32, (half, 4), 0)
            return inputs | {"merges": merges, "second_merges": merges, "items": items, "second_items": items}
        if shape.prefills:
            num_items = -(-shape.num_tokens // self._tokens_per_item) + rows
            inputs["prefill_items"] = Padding(np.int32, (num_items, ITEM_FIELDS), 0)
        if shape.shares_prefixes:
            inputs["prefix_items"] = Padding(np.int32, (self._limits.prefix_items(rows), ITEM_FIELDS), 0)
            inputs["members"] = Padding(np.int32, (rows,), 0)
            inputs["member_partials"] = Padding(np.int32, (rows,), 0)
        inputs["items"] = Padding(np.int32, (self._limits.items(rows), ITEM_FIELDS), 0)
        return inputs

    def _find_prefixes(
        self, seq_ids: np.ndarray, slots: np.ndarray, tables: np.ndarray, context_lens: np.ndarray
    ) -> None:
        """Look anew only when other sequences decode: a prefix that is shared stays so while its members run."""
        if np.array_equal(seq_ids, self._seq_ids):
            return
        self._seq_ids = seq_ids
        full = (context_lens - 1) // self._block_size
        width = int(full.max(initial=0))
        self._groups = find_groups(tables[slots, :width], full, self._block_size) if width else []
