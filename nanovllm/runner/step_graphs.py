"""Steps at fixed shapes: a step runs at the next shape that holds it, as one CUDA graph from embedding to token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanovllm.runner.graph_sizes import GraphSizes, next_size
from nanovllm.runner.uploads import FixedInputs

MIN_ROWS_WITH_PREFIX = 4
MIN_ROWS_WHOLE = 64
"""Fewer rows are mostly cut, and run in the graph for that even where they are not."""


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
    in_halves: bool = False
    """Whether a decode step runs as two halves beside each other, each of half the tokens."""
    cuts_rows: bool = True
    """Whether rows of a decode step may be cut, whose partial results must be merged."""


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

    All graphs are captured at once, the largest first, whose memory the others share.
    """

    def __init__(
        self,
        step: StepFunction,
        make_inputs: Callable[[StepShape], FixedInputs],
        sizes: GraphSizes,
        *,
        finds_prefixes: bool,
        capture: bool,
        may_cut: bool = True,
    ) -> None:
        """`may_cut`: attention goes by work lists, which may cut rows or not; other backends do as they like."""
        self.sizes = sizes
        self._step = step
        self._make_inputs = make_inputs
        self._finds_prefixes = finds_prefixes
        self._may_cut = may_cut
        self._prepared: dict[StepShape, _Prepared] = {}
        self._warm: set[StepShape] = set()
        """Kinds of shapes of which one has run."""
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream() if capture else None
        if capture:
            for shape in self.all_shapes():
                self._prepare(shape)
            torch.cuda.synchronize()

    @property
    def num_graphs(self) -> int:
        return len(self._prepared)

    @property
    def most_input_bytes(self) -> int:
        """What the inputs of a prepared shape take on the device, at most."""
        return max(prepared.inputs.num_bytes for prepared in self._prepared.values())

    def all_shapes(self) -> list[StepShape]:
        """Those of all steps that there can be: with prefills, then without, the largest first."""
        shapes = [self._prefill_shape(*counts) for counts in self.sizes.with_prefills]
        for rows in reversed(self.sizes.decodes):
            shapes += self._decode_shapes(rows)
        return shapes

    def has_shapes(self, *, prefills: bool) -> bool:
        """Whether steps with prefills, or without, run at fixed shapes."""
        return not prefills or bool(self.sizes.tokens)

    def shape(
        self, num_tokens: int, num_sampled: int, *, prefills: bool, shares_prefixes: bool, context_tokens: int = 0
    ) -> StepShape:
        """The shape that such a step runs at, where it has one; `context_tokens` are those of all rows' contexts."""
        assert self.has_shapes(prefills=prefills)
        if not prefills:
            in_halves = not shares_prefixes and self.sizes.runs_in_halves(num_tokens, context_tokens)
            rows = next_size(self.sizes.decodes, num_tokens)
            return self._decode_shape(rows, shares_prefixes=shares_prefixes, in_halves=in_halves)
        return self._prefill_shape(next_size(self.sizes.tokens, num_tokens), next_size(self.sizes.sampled, num_sampled))

    def send(self, shape: StepShape, arrays: Mapping[str, np.ndarray]) -> None:
        """The inputs of the next run."""
        if shape not in self._prepared:
            assert self._stream is None, f"{shape} was not captured at the start"
            self._prepare(shape)
        self._prepared[shape].inputs.send(arrays)

    def run(self, shape: StepShape) -> Tensor:
        """Tokens [num_sampled] of the inputs sent last, padding included; valid until the next run."""
        prepared = self._prepared[shape]
        if prepared.graph is None or prepared.tokens is None:
            return self._step(prepared.inputs.tensors, shape)
        prepared.graph.replay()
        return prepared.tokens

    def without_cuts(self, shape: StepShape) -> StepShape:
        """The shape of a step at `shape` of whose rows none is cut."""
        has_graph = self._runs_whole(shape.num_tokens) and not shape.shares_prefixes
        return replace(shape, cuts_rows=False) if has_graph else shape

    def _runs_whole(self, rows: int) -> bool:
        return rows >= MIN_ROWS_WHOLE and self._may_cut

    def _decode_shapes(self, rows: int) -> list[StepShape]:
        shapes = [self._decode_shape(rows)]
        if rows in self.sizes.in_halves:
            shapes.append(self._decode_shape(rows, in_halves=True))
        if self._runs_whole(rows):
            shapes += [replace(shape, cuts_rows=False) for shape in shapes]
        if self._finds_prefixes and rows >= MIN_ROWS_WITH_PREFIX:
            shapes.append(self._decode_shape(rows, shares_prefixes=True))
        return shapes

    def _decode_shape(self, rows: int, *, shares_prefixes: bool = False, in_halves: bool = False) -> StepShape:
        return StepShape(
            num_tokens=rows,
            num_sampled=rows,
            prefills=False,
            shares_prefixes=shares_prefixes,
            in_halves=in_halves,
        )

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
        """Not by torch.cuda.graph, which collects garbage and empties the allocator's cache each time.

        The first step of a kind runs once, which sets up libraries and compiles. For what others of its kind need
        besides, "relaxed" lets kernels be compiled and loaded within a capture.
        """
        kind = replace(shape, num_tokens=0, num_sampled=0)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
        with torch.cuda.stream(stream):
            if kind not in self._warm:
                prepared.inputs.send({})  # nothing but padding
                self._step(prepared.inputs.tensors, shape)
                stream.synchronize()
                self._warm.add(kind)
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            prepared.tokens = self._step(prepared.inputs.tensors, shape)
            graph.capture_end()
        prepared.graph = graph
