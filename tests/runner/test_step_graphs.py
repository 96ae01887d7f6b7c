"""Sizes that hold every step, and steps that run at them; without graphs, as on a CPU."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.runner.graph_sizes import MIN_HALVES_ROWS, MIN_HALVES_TOKENS, GraphSizes, graph_sizes
from nanovllm.runner.shared_prefixes import MIN_MEMBERS
from nanovllm.runner.step_graphs import MIN_ROWS_WHOLE, StepGraphs, StepShape
from nanovllm.runner.uploads import FixedInputs, Padding

FILL = -5
SIZES = GraphSizes(decodes=[1, 2, 4, 12], tokens=[24, 72, 320], sampled=[4, 12], in_halves=[])

limits = pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens"),
    [(seqs, tokens) for seqs in (1, 7, 16, 256, 1024) for tokens in (64, 1000, 8192, 20_000)],
)


def step(inputs: Mapping[str, Tensor], shape: StepShape) -> Tensor:
    """What is sampled tells of what the step was given, and at which shape."""
    assert len(inputs["ids"]) == shape.num_tokens
    return inputs["ids"][: shape.num_sampled] * 1000 + shape.num_tokens


def step_graphs(sizes: GraphSizes = SIZES, *, finds_prefixes: bool = True) -> StepGraphs:
    def make_inputs(shape: StepShape) -> FixedInputs:
        return FixedInputs(
            {"ids": Padding(np.int64, (shape.num_tokens,), FILL), "items": Padding(np.int32, (8,), 0)},
            torch.device("cpu"),
            1,
        )

    return StepGraphs(step, make_inputs, sizes, finds_prefixes=finds_prefixes, capture=False)


def padding(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """(count, entries that pad it to the next size) of every count."""
    return [(count, min(size for size in sizes if size >= count) - count) for count in range(1, most + 1)]


@limits
def test_sizes_ascend_to_the_largest_step(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    sizes = graph_sizes(max_num_seqs, max_num_batched_tokens, with_prefills=True, with_halves=False)
    for of_kind, most in (
        (sizes.decodes, max_num_seqs),
        (sizes.sampled, max_num_seqs),
        (sizes.tokens, max_num_batched_tokens),
    ):
        assert all(0 < size < following for size, following in pairwise(of_kind))
        assert of_kind[-1] == most
    largest = sizes.largest()
    assert [*largest.decodes, *largest.tokens, *largest.sampled] == [max_num_seqs, max_num_batched_tokens, max_num_seqs]


@limits
def test_every_count_has_a_size_and_little_padding(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    sizes = graph_sizes(max_num_seqs, max_num_batched_tokens, with_prefills=True, with_halves=False)
    assert all(padded < max(min(count, 64), count // 8) for count, padded in padding(sizes.decodes, max_num_seqs))
    assert all(count + padded <= max(2 * count, 128) for count, padded in padding(sizes.sampled, max_num_seqs))
    tokens = padding(sizes.tokens, max_num_batched_tokens)
    assert all(padded < max(min(count, 1024), 64, count // 8) for count, padded in tokens)


def test_the_largest_limits_make_no_more_shapes_than_can_be_captured() -> None:
    assert graph_sizes(65536, 65536, with_prefills=True, with_halves=True).most_graphs() < 600


@limits
@pytest.mark.parametrize("with_prefills", [True, False])
def test_every_step_has_a_shape_that_holds_it(
    max_num_seqs: int, max_num_batched_tokens: int, with_prefills: bool
) -> None:
    graphs = step_graphs(
        graph_sizes(max_num_seqs, max_num_batched_tokens, with_prefills=with_prefills, with_halves=False)
    )
    shapes = set()
    for shares_prefixes in (False, True):
        for rows in range(1, max_num_seqs + 1):
            shape = graphs.shape(rows, rows, prefills=False, shares_prefixes=shares_prefixes)
            assert shape.num_tokens == shape.num_sampled >= rows
            assert (shape.prefills, shape.shares_prefixes) == (False, shares_prefixes)
            shapes.add(shape)
        assert graphs.has_shapes(prefills=False)
        assert graphs.has_shapes(prefills=True) == with_prefills, "without, steps with prefills run at their own size"
        for num_tokens in range(1, max_num_batched_tokens + 1, 7) if with_prefills else ():
            num_sampled = num_tokens * 31 % (min(max_num_seqs, num_tokens) + 1)  # none as well: all are first chunks
            shape = graphs.shape(num_tokens, num_sampled, prefills=True, shares_prefixes=shares_prefixes)
            assert shape.num_tokens >= num_tokens
            assert shape.num_sampled >= num_sampled
            assert shape.prefills
            assert shape.shares_prefixes, "a mixed step's decodes may share prefixes"
            shapes.add(shape)
    assert captured(graphs) >= {shape for shape in shapes if can_come(shape)}


def captured(graphs: StepGraphs) -> set[StepShape]:
    """What is captured at the start, since nothing is later."""
    shapes = graphs.all_shapes()
    assert len(set(shapes)) == len(shapes) <= graphs.sizes.most_graphs()
    return set(shapes)


def can_come(shape: StepShape) -> bool:
    """Fewer decode rows than a group has share nothing."""
    return shape.prefills or not shape.shares_prefixes or shape.num_tokens >= MIN_MEMBERS


@limits
def test_decode_steps_with_much_context_run_in_halves(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    sizes = graph_sizes(max_num_seqs, max_num_batched_tokens, with_prefills=True, with_halves=True)
    assert set(sizes.in_halves) <= set(sizes.decodes)
    assert all(size % 2 == 0 for size in sizes.in_halves)
    graphs = step_graphs(sizes)
    shapes = set()
    for rows in range(1, max_num_seqs + 1):
        for context_tokens in (rows, MIN_HALVES_TOKENS - 1, MIN_HALVES_TOKENS, 10 * MIN_HALVES_TOKENS):
            shape = graphs.shape(rows, rows, prefills=False, shares_prefixes=False, context_tokens=context_tokens)
            fits = shape.num_tokens in sizes.in_halves and rows >= MIN_HALVES_ROWS
            assert shape.in_halves == (fits and context_tokens >= MIN_HALVES_TOKENS)
            whole = graphs.without_cuts(shape)
            assert whole in (shape, replace(shape, cuts_rows=False))
            assert (whole != shape) == (shape.num_tokens >= MIN_ROWS_WHOLE)
            shapes |= {shape, whole}
        apart = graphs.shape(rows, rows, prefills=False, shares_prefixes=True, context_tokens=10**6)
        assert not apart.in_halves
        assert graphs.without_cuts(apart) == apart, "there is no graph of that kind"
        shapes.add(apart)
    assert any(shape.in_halves for shape in shapes) == (max_num_seqs >= MIN_HALVES_ROWS)
    assert captured(graphs) >= {shape for shape in shapes if can_come(shape)}


def test_without_shared_prefixes_no_prefill_shape_has_them() -> None:
    shape = step_graphs(finds_prefixes=False).shape(30, 2, prefills=True, shares_prefixes=False)
    assert shape == StepShape(num_tokens=72, num_sampled=4, prefills=True, shares_prefixes=False)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 12), (12, 12)])
def test_a_decode_step_runs_at_the_next_size_and_gives_its_tokens(rows: int, size: int) -> None:
    graphs = step_graphs()
    shape = graphs.shape(rows, rows, prefills=False, shares_prefixes=False)
    graphs.send(shape, {"ids": np.arange(rows)})
    tokens = graphs.run(shape).tolist()
    assert tokens == [id * 1000 + size for id in [*range(rows), *[FILL] * (size - rows)]]


def test_a_step_with_prefills_runs_at_the_next_sizes() -> None:
    graphs = step_graphs()
    shape = StepShape(num_tokens=72, num_sampled=12, prefills=True, shares_prefixes=True)
    assert graphs.shape(25, 5, prefills=True, shares_prefixes=False) == shape
    graphs.send(shape, {"ids": np.arange(25)})
    assert graphs.run(shape).tolist() == [id * 1000 + 72 for id in range(12)]


def test_each_run_is_of_what_its_shape_was_sent_last() -> None:
    rng = np.random.default_rng(0)
    graphs = step_graphs()
    shapes = set()
    for _ in range(100):
        rows, shares_prefixes = int(rng.integers(1, 13)), bool(rng.integers(2))
        shape = graphs.shape(rows, rows, prefills=False, shares_prefixes=shares_prefixes)
        shapes.add(shape)
        ids = rng.integers(0, 1000, rows)
        graphs.send(shape, {"ids": ids})
        padded = [*ids.tolist(), *[FILL] * (shape.num_tokens - rows)]
        assert graphs.run(shape).tolist() == [id * 1000 + shape.num_tokens for id in padded]
        assert graphs.num_graphs == len(shapes)
