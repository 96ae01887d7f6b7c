"""A decode step as two halves of its rows at the same time: while one reads keys and values, the other multiplies.

Attention waits for memory, and a layer's matrix products, of few rows, for each other; no row needs another one's
result. So the halves go through the layers on two streams, and what one leaves idle the other uses, at the price of
reading the weights twice. After NanoFlow (arXiv 2408.12757), which overlaps parts of a batch in the same way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.launch import beside_another


class Halves:
    """Runs two functions beside each other on a GPU; on a CPU one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Tensor:
        """What they return, one behind the other."""
        with beside_another():
            if self._aside is None:
                return torch.cat([first(), second()])
            here = torch.cuda.current_stream(self._aside.device)
            self._aside.wait_stream(here)
            done = first()
            with torch.cuda.stream(self._aside):
                also_done = second()
            here.wait_stream(self._aside)
        return torch.cat([done, also_done])
