"""What stays on the device from step to step: of every slot its block table, its last token, its sampling."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanovllm.runner.sampling_table import SamplingTable


class DeviceState:
    """One row for each slot, and one more that padding may write to."""

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.spare_slot = max_num_seqs
        self.block_tables = torch.zeros((max_num_seqs + 1, max_blocks), dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.sampling = SamplingTable(max_num_seqs + 1, device)

    @property
    def spare_entry(self) -> int:
        """Place, counted over all block tables, of an entry that nobody reads."""
        return self.spare_slot * self.block_tables.shape[1]

    def update(self, inputs: Mapping[str, Tensor]) -> None:
        """Enter new block table entries, `table_places` int64 [N] and `table_blocks` int32 [N]."""
        self.block_tables.view(-1).index_copy_(0, inputs["table_places"], inputs["table_blocks"])

    def keep_tokens(self, slots: Tensor, tokens: Tensor) -> None:
        """Remember what was sampled, [N]; a failed row's -1 must not become an index, and nobody uses what comes of it."""
        self.last_tokens.index_copy_(0, slots, tokens.clamp(min=0).to(torch.int64))
