"""Decode steps at fixed sizes: a step of B rows runs at the next size that holds them, as one CUDA graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.runner.uploads import FixedInputs

MIN_CASCADE_ROWS = 4


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Sizes that hold every number of rows up to max_num_seqs. Steps are cheap where a padded row is: below 256 the
    matrix products take the same time whatever the rows."""
    sizes = {1, 2, 4, 8, 16, 24, *range(32, 256, 32), *range(256, max_num_seqs, 64)}
    return sorted(size for size in sizes if size < max_num_seqs) + [max_num_seqs]


StepFunction = Callable[[Mapping[str, Tensor], bool], Tensor]
"""The work of one decode step: fixed inputs, and whether shared prefixes are read apart -> tokens [size]."""


@dataclass(slots=True)
class _Size:
    rows: int
    inputs: FixedInputs
    graphs: "dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]]"
    """With and without shared prefixes: the graph, and the tokens that it leaves."""


class DecodeGraphs:
    """Runs `step` at fixed sizes. With `capture` as CUDA graphs; without, directly, which is for tests on a CPU."""

    def __init__(
        self,
        step: StepFunction,
        make_inputs: Callable[[int], FixedInputs],
        sizes: list[int],
        *,
        with_prefixes: bool,
        capture: bool,
    ) -> None:
        self._step = step
        self._sizes = {rows: _Size(rows, make_inputs(rows), {}) for rows in sizes}
        self._of_count = np.array(sizes)[np.searchsorted(sizes, np.arange(sizes[-1] + 1))].tolist()
        self._captures = capture
        if capture:
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            for rows in sorted(sizes, reverse=True):  # the smaller ones fit into the largest one's memory
                variants = (False, True) if with_prefixes and rows >= MIN_CASCADE_ROWS else (False,)
                for shares_prefixes in variants:
                    self._capture(self._sizes[rows], shares_prefixes, pool, stream)
            torch.cuda.synchronize()

    @property
    def num_graphs(self) -> int:
        return sum(len(size.graphs) for size in self._sizes.values())

    def size_for(self, num_rows: int) -> int:
        return self._of_count[num_rows]

    def send(self, num_rows: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The step's inputs."""
        self._sizes[self.size_for(num_rows)].inputs.send(arrays)

    def run(self, num_rows: int, shares_prefixes: bool) -> Tensor:
        """Tokens [num_rows] of the inputs sent last; valid until the next run."""
        size = self._sizes[self.size_for(num_rows)]
        if not self._captures:
            return self._step(size.inputs.tensors, shares_prefixes)[:num_rows]
        graph, tokens = size.graphs[shares_prefixes]
        graph.replay()
        return tokens[:num_rows]

    def _capture(
        self, size: _Size, shares_prefixes: bool, pool: "tuple[int, int]", stream: "torch.cuda.Stream"
    ) -> None:
        # Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            size.inputs.send({})  # nothing but padding
            self._step(size.inputs.tensors, shares_prefixes)  # compiles what is not compiled, and sets up libraries
            stream.synchronize()
            graph.capture_begin(pool=pool)
            tokens = self._step(size.inputs.tensors, shares_prefixes)
            graph.capture_end()
        size.graphs[shares_prefixes] = graph, tokens
