"""What the sampler needs to know of each row of logits."""

from typing import NamedTuple

from torch import Tensor


class Draws(NamedTuple):
    """How each of N rows of logits is to be sampled; views of one settings matrix, or tensors of their own.

    All are [N], and the first seven may be strided. With `slot`, these seven have one entry for each slot of an engine
    instead, and row n's is at slot[n].
    """

    temperature: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int32; 0 is off
    top_p: Tensor  # float32; 1 is off
    min_p: Tensor  # float32; 0 is off
    seed: Tensor  # int64
    row: Tensor  # int64
    sample: Tensor  # int32
    position: Tensor  # int32, contiguous; place in its sequence of the token that is sampled
    slot: Tensor | None = None  # int64, contiguous

    def by_row(self) -> "Draws":
        """The same without slots."""
        if self.slot is None:
            return self
        settings = (setting[self.slot] for setting in self[:7])
        return Draws(*settings, position=self.position)
