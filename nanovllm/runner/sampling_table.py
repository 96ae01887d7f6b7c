"""The sampling settings of every slot, on the device."""

import numpy as np
import torch
from torch import Tensor

from kernels.draws import Draws
from nanovllm.engine.plan import Admission

_SEED, _ROW = 0, 2  # int64 columns take two
_SAMPLE, _TOP_K = 4, 5
_TEMPERATURE, _TOP_P, _MIN_P = 6, 7, 8
_WIDTH = 10  # even, so that int64 columns can be viewed


def settings_rows(admissions: tuple[Admission, ...]) -> np.ndarray:
    """int32 [admissions, columns] of the table."""
    rows = np.zeros((len(admissions), _WIDTH), np.int32)
    wide, real = rows.view(np.int64), rows.view(np.float32)
    for i, admission in enumerate(admissions):
        sampling = admission.sampling
        wide[i, _SEED // 2] = sampling.seed
        wide[i, _ROW // 2] = admission.row
        rows[i, _SAMPLE] = admission.sample
        rows[i, _TOP_K] = sampling.top_k
        real[i, _TEMPERATURE] = 0.0 if sampling.greedy else sampling.temperature
        real[i, _TOP_P] = sampling.top_p
        real[i, _MIN_P] = sampling.min_p
    return rows


class SamplingTable:
    """One row for each slot, entered when a sequence takes the slot; an empty slot is greedy."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._rows = rows = torch.zeros((num_slots, _WIDTH), dtype=torch.int32, device=device)
        wide, real = rows.view(torch.int64), rows.view(torch.float32)
        self._settings = (
            real[:, _TEMPERATURE],
            rows[:, _TOP_K],
            real[:, _TOP_P],
            real[:, _MIN_P],
            wide[:, _SEED // 2],
            wide[:, _ROW // 2],
            rows[:, _SAMPLE],
        )

    def enter(self, slots: Tensor, rows: Tensor) -> None:
        """`slots` int64 [N], `rows` as settings_rows makes them."""
        self._rows.index_copy_(0, slots, rows)

    def draws(self, slots: Tensor, positions: Tensor) -> Draws:
        """For rows of logits that belong to `slots`, int64 [N], and sample the token at `positions`, int32 [N]."""
        return Draws(*self._settings, position=positions, slot=slots)
