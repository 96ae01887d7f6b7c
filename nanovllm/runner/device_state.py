"""What stays on the device from step to step: of every slot its block table, its last token, its sampling."""

import torch
from torch import Tensor

from nanovllm.runner.sampling_table import SamplingTable


class DeviceState:
    """One row for each slot, and one more that padding may write to."""

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.spare_slot = max_num_seqs
        self.block_tables = torch.zeros((max_num_seqs + 1, max_blocks), dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.sampling = SamplingTable(max_num_seqs + 1, device)

    @property
    def spare_entry(self) -> int:
        """Place, counted over all block tables, of an entry that nobody reads."""
        return self.spare_slot * self.block_tables.shape[1]

    def update_tables(self, places: Tensor, blocks: Tensor) -> None:
        """Enter `blocks`, int32 [N], at `places`, int64 [N], counted over all block tables."""
        self.block_tables.view(-1).index_copy_(0, places, blocks)
