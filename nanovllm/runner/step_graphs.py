"""Steps at fixed shapes: a step runs at the next shape that holds it, as one CUDA graph from embedding to token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.runner.uploads import FixedInputs

MIN_ROWS_WITH_PREFIX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a graph is made for."""

    num_tokens: int
    num_sampled: int
    """Rows of logits; in a decode step the tokens, each of which samples."""
    prefills: bool
    """Whether rows may prefill; otherwise every token is a decode row."""
    shares_prefixes: bool
    """Whether prefixes that decode rows share are read apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """The sizes that steps are padded to, ascending."""

    decodes: list[int]
    """Rows of decode steps."""
    tokens: list[int]
    """Tokens of steps with prefills; empty where those run at their own size."""
    sampled: list[int]
    """Rows of logits of steps with prefills."""

    def most_graphs(self) -> int:
        """How many shapes steps can have."""
        with_prefills = sum(size <= _next(self.sampled, count) for count in self.tokens for size in self.sampled)
        return 2 * len(self.decodes) + with_prefills

    def largest(self) -> "GraphSizes":
        """The last of each: whose memory the others share."""
        return GraphSizes(decodes=self.decodes[-1:], tokens=self.tokens[-1:], sampled=self.sampled[-1:])


def graph_sizes(max_num_seqs: int, max_num_batched_tokens: int, *, with_prefills: bool) -> GraphSizes:
    """Sizes that hold every step, with little padding where padding costs.

    Decode steps are dense up to 256, where a matrix product takes the same time whatever its rows, and beyond every
    64th. Steps with prefills mostly fill max_num_batched_tokens.
    """
    decodes = {1, 2, 4, 8, 16, 24, *range(32, 256, 32), *range(256, max_num_seqs, 64)}
    tokens = {64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, *range(4096, max_num_batched_tokens, 1024)}
    sampled = {16 << i for i in range(12)}

    def up_to(sizes: set[int], most: int) -> list[int]:
        return [*sorted(size for size in sizes if size < most), most]

    return GraphSizes(
        decodes=up_to(decodes, max_num_seqs),
        tokens=up_to(tokens, max_num_batched_tokens) if with_prefills else [],
        sampled=up_to(sampled, max_num_seqs),
    )


StepFunction = Callable[[Mapping[str, Tensor], StepShape], Tensor]
"""A step's work over fixed inputs: tokens [num_sampled]."""


@dataclass(slots=True)
class _Prepared:
    inputs: FixedInputs
    graph: "torch.cuda.CUDAGraph | None" = None
    tokens: Tensor | None = None
    """What the graph leaves."""


class StepGraphs:
    """Runs `step` at fixed shapes. With `capture` as CUDA graphs; without, directly, which is for tests on a CPU.

    The decode steps' graphs, and that of the largest step with prefills, are captured at once, largest first: all share
    its memory. Other shapes of steps with prefills are captured when they first come, in some 30 ms.
    """

    def __init__(
        self,
        step: StepFunction,
        make_inputs: Callable[[StepShape], FixedInputs],
        sizes: GraphSizes,
        *,
        finds_prefixes: bool,
        capture: bool,
    ) -> None:
        self.sizes = sizes
        self._step = step
        self._make_inputs = make_inputs
        self._finds_prefixes = finds_prefixes
        self._prepared: dict[StepShape, _Prepared] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream() if capture else None
        if capture:
            if sizes.tokens:
                self._prepare(self._prefill_shape(sizes.tokens[-1], sizes.sampled[-1]))
            for rows in reversed(sizes.decodes):
                for shares_prefixes in (False, True) if finds_prefixes and rows >= MIN_ROWS_WITH_PREFIX else (False,):
                    self._prepare(self._decode_shape(rows, shares_prefixes))

    @property
    def num_graphs(self) -> int:
        return len(self._prepared)

    def has_shapes(self, *, prefills: bool) -> bool:
        """Whether steps with prefills, or without, run at fixed shapes."""
        return not prefills or bool(self.sizes.tokens)

    def shape(self, num_tokens: int, num_sampled: int, *, prefills: bool, shares_prefixes: bool) -> StepShape:
        """The shape that such a step runs at, where it has one."""
        assert self.has_shapes(prefills=prefills)
        if not prefills:
            return self._decode_shape(_next(self.sizes.decodes, num_tokens), shares_prefixes)
        return self._prefill_shape(_next(self.sizes.tokens, num_tokens), _next(self.sizes.sampled, num_sampled))

    def send(self, shape: StepShape, arrays: Mapping[str, np.ndarray]) -> None:
        """The inputs of the next run."""
        if shape not in self._prepared:
            self._prepare(shape)
        self._prepared[shape].inputs.send(arrays)

    def run(self, shape: StepShape) -> Tensor:
        """Tokens [num_sampled] of the inputs sent last, padding included; valid until the next run."""
        prepared = self._prepared[shape]
        if prepared.graph is None or prepared.tokens is None:
            return self._step(prepared.inputs.tensors, shape)
        prepared.graph.replay()
        return prepared.tokens

    def _decode_shape(self, rows: int, shares_prefixes: bool) -> StepShape:
        return StepShape(num_tokens=rows, num_sampled=rows, prefills=False, shares_prefixes=shares_prefixes)

    def _prefill_shape(self, num_tokens: int, num_sampled: int) -> StepShape:
        return StepShape(
            num_tokens=num_tokens, num_sampled=num_sampled, prefills=True, shares_prefixes=self._finds_prefixes
        )

    def _prepare(self, shape: StepShape) -> None:
        prepared = _Prepared(self._make_inputs(shape))
        if self._stream is not None:
            self._capture(shape, prepared, self._stream)
        self._prepared[shape] = prepared

    def _capture(self, shape: StepShape, prepared: _Prepared, stream: "torch.cuda.Stream") -> None:
        # Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            prepared.inputs.send({})  # nothing but padding
            self._step(prepared.inputs.tensors, shape)  # compiles what is not compiled, and sets up libraries
            stream.synchronize()
            graph.capture_begin(pool=self._pool)
            prepared.tokens = self._step(prepared.inputs.tensors, shape)
            graph.capture_end()
        torch.cuda.synchronize()
        prepared.graph = graph


def _next(sizes: list[int], count: int) -> int:
    """The least of the ascending `sizes` that holds `count`; the last one where none does."""
    return next((size for size in sizes if size >= count), sizes[-1])
