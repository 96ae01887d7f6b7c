"""Which prefixes a step's decode rows share in the cache, as the runner's attention finds them."""

import numpy as np

from jobs.simulation.forward_cost import SharedReads
from nanovllm.engine.plan import Plan
from nanovllm.runner.shared_prefixes import find_groups

NONE = SharedReads(0, 0)


class SharedReadsFinder:
    """Follows the plans' block tables. As in the runner, groups are looked for only when other rows decode."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._block_size = block_size
        self._has_hits = False
        self._seq_ids = np.empty(0, np.int64)
        self._found = NONE

    def find(self, plan: Plan) -> SharedReads:
        self._tables[plan.table_slots, plan.table_columns] = plan.table_blocks
        if not self._has_hits:
            # Until a prompt finds a prefix in the cache, no block stands in two tables.
            self._has_hits = bool(plan.admissions) and bool((plan.starts[-len(plan.admissions) :] > 0).any())
            return NONE
        decodes = slice(0, plan.num_decodes)
        if not np.array_equal(plan.seq_ids[decodes], self._seq_ids):
            self._seq_ids = plan.seq_ids[decodes]
            self._found = self._look(plan.slots[decodes], plan.starts[decodes] // self._block_size)
        return self._found

    def _look(self, slots: np.ndarray, num_full_blocks: np.ndarray) -> SharedReads:
        width = int(num_full_blocks.max(initial=0))
        if not width:
            return NONE
        groups = find_groups(self._tables[slots, :width], num_full_blocks, self._block_size)
        prefixes = [(len(group.rows), group.num_blocks * self._block_size) for group in groups]
        return SharedReads(
            saved=sum((rows - 1) * tokens for rows, tokens in prefixes),
            pairs=sum(rows * tokens for rows, tokens in prefixes),
        )
