"""Prepares a step's attention for the Triton kernels, on the host and on the device."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kernels.decode_work import ITEM_FIELDS, DecodeWork
from kernels.paged_decode_attention import decode_tuning, num_programs
from kernels.paged_prefill_attention import tokens_per_item
from kernels.shared_prefix_attention import members_per_item
from nanovllm.engine.plan import Plan
from nanovllm.models.model_config import Qwen3Config
from nanovllm.runner.batch import prefill_items
from nanovllm.runner.decode_work import WorkLimits, share_out
from nanovllm.runner.shared_prefixes import PrefixGroup, find_groups
from nanovllm.runner.uploads import Padding


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
        self._num_layers = c.num_hidden_layers
        self._tokens_per_item = tokens_per_item(dtype, c.head_dim, group)
        self._limits = WorkLimits(
            num_kv_heads=c.num_key_value_heads,
            num_programs=num_programs(device) * decode_tuning(dtype, c.head_dim).programs_per_sm,
            num_prefix_programs=num_programs(device),
            members_per_item=members_per_item(dtype, c.head_dim, group),
        )
        num_partials = self._limits.partials(max_num_seqs)
        shape = (num_partials, c.num_attention_heads, c.head_dim)
        self._partial_out = torch.empty(shape, dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
        self._seq_ids = np.empty(0, np.int64)
        self._groups: list[PrefixGroup] = []

    def prefill_items(self, plan: Plan) -> np.ndarray:
        rows = slice(plan.num_decodes, None)
        return prefill_items(plan.num_tokens[rows], plan.starts[rows], plan.slots[rows], self._tokens_per_item)

    def decode_arrays(self, plan: Plan, tables: np.ndarray, context_lens: np.ndarray) -> dict[str, np.ndarray]:
        """The work list of the plan's decode rows; `tables` are all slots', `context_lens` the decode rows'."""
        decodes = plan.num_decodes
        slots = plan.slots[:decodes]
        if self.finds_prefixes:
            self._find_prefixes(plan.seq_ids[:decodes], slots, tables, context_lens)
        work = share_out(slots, context_lens, self._groups, self._block_size, self._limits)
        counts = np.array([len(work.items), len(work.merges), len(work.prefix_items), 0], np.int32)
        arrays = {
            "work_counts": counts,
            "counters": np.zeros(self._num_layers, np.int32),
            "merges": work.merges,
            "items": work.items,
        }
        if len(work.prefix_items):
            arrays |= {
                "prefix_items": work.prefix_items,
                "members": work.members,
                "member_partials": work.member_partials,
            }
        return arrays

    def on_device(self, inputs: Mapping[str, Tensor], shares_prefixes: bool) -> DecodeWork:
        """The same as the kernels take it."""
        counts = inputs["work_counts"]
        none = counts[3:]
        return DecodeWork(
            items=inputs["items"],
            num_items=counts[0:],
            counters=inputs["counters"],
            merges=inputs["merges"],
            num_merges=counts[1:],
            prefix_items=inputs.get("prefix_items", none),
            num_prefix_items=counts[2:],
            members=inputs.get("members", none),
            member_partials=inputs.get("member_partials", none),
            partial_out=self._partial_out,
            partial_lse=self._partial_lse,
            shares_prefixes=shares_prefixes,
        )

    def fixed_inputs(self, rows: int) -> dict[str, Padding]:
        """Capacities for `rows` decode rows; the longest, `items`, last."""
        prefixes = {
            "prefix_items": Padding(np.int32, (self._limits.prefix_items(rows), ITEM_FIELDS), 0),
            "members": Padding(np.int32, (rows,), 0),
            "member_partials": Padding(np.int32, (rows,), 0),
        }
        return {
            "work_counts": Padding(np.int32, (4,), 0),
            "counters": Padding(np.int32, (self._num_layers,), 0),
            "merges": Padding(np.int32, (rows, 4), 0),
            **(prefixes if self.finds_prefixes else {}),
            "items": Padding(np.int32, (self._limits.items(rows), ITEM_FIELDS), 0),
        }

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
