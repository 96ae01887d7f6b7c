"""The LM head's product, and a token drawn from each row of it."""

from torch import Tensor

from kernels import hopper
from kernels.draws import Draws
from kernels.linear import linear
from kernels.sample import pick_tokens, sample


def linear_sample(x: Tensor, weight: Tensor, draws: Draws, last_tokens: Tensor | None = None) -> Tensor:
    """`sample` of the product of the first N rows of x [M, in] with the transpose of weight [V, in], both contiguous.

    N is the number of draws; the rows behind are padding.
    """
    x = x[: len(draws.position)]
    if hopper.is_lm_head(x, weight):
        from kernels.hopper_lm_head import hopper_lm_head

        logits, blocks = hopper_lm_head(x, weight, draws)
        return pick_tokens(logits, blocks, draws, last_tokens)
    return sample(linear(x, weight), draws, last_tokens)
