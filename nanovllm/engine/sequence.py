"""One sequence on its way through the engine."""

import mmap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanovllm.events import FinishedSequence
from nanovllm.sampling_params import ResolvedSampling

StopCheck = Callable[[int], bool]
"""Told of each output token once, in order: whether the text now holds a stop string."""


class Sequence:
    """A sequence's identity, limits and times.

    While it runs, its tokens and its block table stand in the arrays of `Running` and `token_ids` is stale; while it
    waits (new or preempted), `token_ids` holds prompt and output so far.
    """

    __slots__ = (
        "arrived_ns",
        "first_scheduled_ns",
        "first_token_ns",
        "limit",
        "num_cached_tokens",
        "num_in_flight",
        "num_preemptions",
        "num_prompt_tokens",
        "prefix_hashes",
        "request_id",
        "row",
        "sample",
        "sampling",
        "seq_id",
        "stop_check",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        token_ids: np.ndarray,
        sampling: ResolvedSampling,
        *,
        row: int,
        sample: int = 0,
        request_id: str = "",
        stop_check: StopCheck | None = None,
        arrived_ns: int = 0,
    ) -> None:
        """`token_ids` that can be written to are copied."""
        self.seq_id = seq_id
        self.token_ids = _own(token_ids)
        self.sampling = sampling
        self.row = row
        self.sample = sample
        self.request_id = request_id
        self.stop_check = stop_check
        self.stop_token_ids = frozenset(sampling.stop_token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.arrived_ns = arrived_ns
        self.first_scheduled_ns: int | None = None
        self.first_token_ns: int | None = None
        self.limit = 0
        """Tokens, prompt included, at which it ends at the latest; the scheduler sets it."""
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.prefix_hashes: list[int] = []
        """Chained hashes of the leading full blocks, as far as they have been needed."""
        self.num_in_flight = 0
        """Of a preempted sequence: submitted steps whose result has not arrived."""

    def stops_with(self, token_id: int) -> bool:
        """Whether the newest output token ends the sequence by its own stop tokens or strings; ask once per token."""
        if token_id in self.stop_token_ids:
            return True
        return self.stop_check is not None and self.stop_check(token_id)

    def output_ids(self) -> list[int]:
        """What has been sampled so far, of a sequence that waits."""
        return self.token_ids[self.num_prompt_tokens :].tolist()


def _own(token_ids: np.ndarray) -> np.ndarray:
    """As int32 that nobody changes any more, as the prefix cache relies on what stands in it: mostly a copy.

    What is read-only down to who owns the memory is taken as it is; that nobody has an older view of it through which
    it can be written to is for the caller to see to.
    """
    base = token_ids
    while isinstance(base, np.ndarray) and not base.flags.writeable:
        base = base.base
    is_fixed = base is None or isinstance(base, bytes | mmap.mmap)
    return token_ids if is_fixed and token_ids.dtype == np.int32 else np.array(token_ids, np.int32)


class Ended(NamedTuple):
    """A sequence that has just ended, with all its output."""

    sequence: Sequence
    token_ids: list[int]
    reason: str
    """eos, stop, max_tokens, abort or error"""

    def fact(self) -> FinishedSequence:
        return FinishedSequence(self.sequence.seq_id, len(self.token_ids), self.reason)
