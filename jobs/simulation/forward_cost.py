"""What a step's time on the device depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jobs.simulation.run_facts import RunFacts
from jobs.simulation.step_sizes import Padding, StepSizes

WHOLE = "whole step"
FEATURES = (
    "step",
    WHOLE,
    "step with prefills",
    "step beyond 16 tokens",
    "tokens up to 16",
    "tokens up to 64",
    "rows of logits",
    "TFLOP",
    "decode context",
    "pairs",
)
DOUBTED = MappingProxyType(
    {
        WHOLE: 0.1,
        "step with prefills": 1.0,
        "step beyond 16 tokens": 0.1,
        "tokens up to 16": 0.1,
        "tokens up to 64": 0.1,
        "pairs": 0.1,
    }
)
"""Weights. A run whose steps with prefills are all alike cannot tell the first and the last from the operations, one of
few sequences, or of many all the time, the others from steps and rows of logits. That there are prefills at all costs
little by itself."""
FEW_TOKENS = 16
"""Up to here a GPU's matrix products are other kernels than beyond (kernels/linear.py)."""
GPU_KNEE = 256
"""Padded tokens, or rows of logits, up to which a GPU's matrix products take the time of reading the weights, whatever
the tokens; beyond, operations count."""

PREFIX_PAIR = 2.5
"""Pairs of prompts' attention that take a GPU as long as one of a prefix that is read once for many rows: in a step of
`shared` this kernel and the merge behind it take 2 ms for 0.48 TFLOP, prompts' attention reaches 650 TFLOP/s."""


class SharedReads(NamedTuple):
    """What shared prefixes change in a step's decode attention; numbers, or arrays [steps]."""

    saved: Any = 0
    """Tokens whose KV is not read again."""
    pairs: Any = 0
    """(row, token) pairs of the prefixes that are read once for several rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFeatures:
    """Turns the sizes of steps into FEATURES, by the shape of the model and the kind of device.

    One feature counts floating-point operations, so that what only a wide batch, a long prompt or many rows of logits
    show is predicted from whichever of these the recorded run had. Up to the knee, matrix products cost their weights.
    """

    knee: int
    body: float
    """TFLOP of a token's matrix products, the head's apart."""
    head: float
    """TFLOP of a row of logits."""
    pair: float
    """TFLOP of a (query, key) pair in the attention of all layers."""

    @classmethod
    def of(cls, facts: RunFacts) -> "ForwardFeatures":
        return cls.of_model(facts.engine.get("architecture"), on_gpu=facts.on_gpu)

    @classmethod
    def of_model(cls, c: Mapping[str, Any] | None, *, on_gpu: bool) -> "ForwardFeatures":
        """`c` is the model's shape, as a manifest has it; without it (older runs) tokens alone count as operations."""
        knee = GPU_KNEE if on_gpu else 0
        if c is None:
            return cls(knee=knee, body=1e-9, head=0.0, pair=0.0)
        hidden, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_kv_heads"]
        attention = hidden * c["head_dim"] * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * c["intermediate_size"]
        return cls(
            knee=knee,
            body=2e-12 * c["num_layers"] * layer,
            head=2e-12 * hidden * c["vocab_size"],
            pair=4e-12 * c["num_layers"] * heads * c["head_dim"],
        )

    def _latency_share(self, tokens: Any) -> Any:
        """How much of what few tokens wait for shows in a step: nothing once the matrix units never wait."""
        if not self.knee:
            return 1.0
        return _most(_least(2 - tokens / (4 * self.knee), 1), 0)

    def columns(self, sizes: StepSizes, padding: Padding, shared: SharedReads, in_halves: Any) -> tuple[Any, ...]:
        """FEATURES of one step, or of steps whose sizes are arrays."""
        tokens, logits_rows = padding.padded(sizes)
        products = self.body * _most(tokens - self.knee, 0) + self.head * _most(logits_rows - self.knee, 0)
        prefills = sizes.num_decodes < sizes.num_rows
        pairs = apart = sizes.prefill_pairs + shared.pairs
        if self.knee:  # a GPU's matrix units multiply for attention as for the rest
            logits_rows, apart = _least(logits_rows, self.knee), shared.pairs
            pairs = sizes.prefill_pairs + PREFIX_PAIR * shared.pairs
        few = self._latency_share(tokens)
        return (
            1.0,
            1 - in_halves,
            prefills,
            few * (tokens > FEW_TOKENS),
            few * _least(tokens, FEW_TOKENS),
            few * _least(tokens, 64),
            logits_rows,
            products + self.pair * pairs,
            sizes.decode_context - shared.saved,
            apart,
        )


def _least(value: Any, bound: int) -> Any:
    """numpy's minimum, of one number in a twentieth of its time."""
    return np.minimum(value, bound) if isinstance(value, np.ndarray) else min(value, bound)


def _most(value: Any, bound: int) -> Any:
    """As _least, of the maximum."""
    return np.maximum(value, bound) if isinstance(value, np.ndarray) else max(value, bound)
