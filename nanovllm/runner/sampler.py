"""The sampling settings of every slot, and the draw."""

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from nanovllm.engine.plan import Admission


class Sampler:
    """Holds each slot's settings from admission on; draws for any selection of slots."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seed = np.zeros(max_num_seqs, np.int64)
        self._row = np.zeros(max_num_seqs, np.int64)
        self._sample = np.zeros(max_num_seqs, np.int64)

    def admit(self, admissions: tuple[Admission, ...]) -> None:
        for admission in admissions:
            slot, sampling = admission.slot, admission.sampling
            self._temperature[slot] = 0.0 if sampling.greedy else sampling.temperature
            self._top_k[slot] = sampling.top_k
            self._top_p[slot] = sampling.top_p
            self._min_p[slot] = sampling.min_p
            self._seed[slot] = sampling.seed
            self._row[slot] = admission.row
            self._sample[slot] = admission.sample

    def draw(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """int64 [slots], -1 for a row that is not finite, from logits [slots, V].

        `positions` int64 [slots]: the sampled token's place in its sequence.
        """
        temperature, top_k, top_p, min_p = (
            values[slots] for values in (self._temperature, self._top_k, self._top_p, self._min_p)
        )
        if not temperature.any():
            uniform = torch.empty(0, dtype=torch.float64, device=self._device)
        else:
            uniform = reference.philox_uniform(
                *(self._to_device(v) for v in (self._seed[slots], self._row[slots], self._sample[slots], positions))
            )
        filtered = bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any())
        return reference.sample(
            logits,
            self._to_device(temperature),
            self._to_device(top_k),
            self._to_device(top_p),
            self._to_device(min_p),
            uniform,
            filtered,
        )

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
