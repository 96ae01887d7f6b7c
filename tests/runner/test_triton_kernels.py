"""The engine on the Triton kernels gives the tokens of the reference; without a GPU, in Triton's interpreter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.attention_work import DecodeWork
from nanovllm.engine.plan import StepResult
from nanovllm.runner.graph_sizes import GraphSizes
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.step_graphs import StepShape
from nanovllm.sampling_params import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.kernels.paged import DEVICE
from tests.runner.harness import Harness, build
from tests.runner.test_transformers_parity import random_prompts

# Rows that pad a step to its size hold what their memory held; numpy, in the interpreter, complains of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, max_tokens=6, ignore_eos=True, seed=3)
SIZES = GraphSizes(decodes=[1, 2, 4, 12], tokens=[24, 72, 160, 400], sampled=[4, 12], in_halves=[])
LAYERS = 2
PREFIX = random_prompts([64], seed=5)[0]
PROMPTS = [*random_prompts([1, 15, 17]), *(PREFIX + tail for tail in random_prompts([3, 1, 20, 9], seed=6))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, hidden_size=64, intermediate_size=96, head_dim=32, num_hidden_layers=LAYERS)
    return directory


def on_triton(checkpoint: Path, *, fixed_sizes: GraphSizes | None = SIZES, **settings: object) -> Harness:
    return build(
        checkpoint,
        device=DEVICE.type,
        kernels="triton",
        attention="triton",
        max_num_seqs=12,
        fixed_sizes=fixed_sizes,
        **settings,  # pyright: ignore[reportArgumentType]
    )


def tokens(harness: Harness, params: SamplingParams) -> list[list[int]]:
    return [output.token_ids for output in harness.run(PROMPTS, params)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return tokens(build(checkpoint), GREEDY)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("fixed_sizes", [None, SIZES])
def test_greedy_tokens_are_those_of_the_reference(
    checkpoint: Path, expected: list[list[int]], block_size: int, fixed_sizes: GraphSizes | None
) -> None:
    harness = on_triton(checkpoint, block_size=block_size, max_num_batched_tokens=64, fixed_sizes=fixed_sizes)
    assert tokens(harness, GREEDY) == expected
    assert harness.counters.cached_tokens > 0
    assert harness.counters.chunked_prefills > 0
    decodes = [event for event in harness.counters.steps if event.schedule.plan.phase == "decode"]
    padded = {event.result.padded_batch_size for event in decodes}
    assert fixed_sizes is None or DEVICE.type == "cuda" or padded <= set(fixed_sizes.decodes)


def preempting(checkpoint: Path, sizes: GraphSizes) -> None:
    """Rows that are preempted, and begin again, end with the reference's tokens."""
    prompts = random_prompts([14] * 5)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    harness = on_triton(checkpoint, num_blocks=6, fixed_sizes=sizes)
    got = [output.token_ids for output in harness.run(prompts, params)]
    assert got == [output.token_ids for output in build(checkpoint).run(prompts, params)]
    assert harness.counters.preemptions > 0


def test_preempted_rows_too(checkpoint: Path) -> None:
    preempting(checkpoint, SIZES)


def test_each_choice_alone(checkpoint: Path, expected: list[list[int]]) -> None:
    assert tokens(build(checkpoint, device=DEVICE.type, kernels="triton", attention="reference"), GREEDY) == expected
    assert tokens(build(checkpoint, device=DEVICE.type, kernels="reference", attention="triton"), GREEDY) == expected


def test_draws_are_those_of_the_reference(checkpoint: Path) -> None:
    harness = build(
        checkpoint, device=DEVICE.type, kernels="triton", attention="triton", max_num_seqs=12, fixed_sizes=SIZES
    )
    drawn, wanted = tokens(harness, SAMPLED), tokens(build(checkpoint), SAMPLED)
    same = sum(a == b for x, y in zip(drawn, wanted, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.95 * SAMPLED.max_tokens * len(PROMPTS)  # a draw may differ within rounding of a boundary


def test_decode_steps_in_halves_change_no_token(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_ROWS", 2)
    monkeypatch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_TOKENS", 1)
    sizes = replace(SIZES, in_halves=[2, 4, 12])
    harness = on_triton(checkpoint, max_num_batched_tokens=72, fixed_sizes=sizes)
    runner = harness.assembly.engine.runner
    assert isinstance(runner, ModelRunner)
    assert runner.graphs is not None
    shapes = []
    run = runner.graphs.run

    def spy(shape: StepShape) -> torch.Tensor:
        shapes.append(shape)
        return run(shape)

    results, collect = [], runner.collect

    def listen() -> StepResult:
        results.append(collect())
        return results[-1]

    monkeypatch.setattr(runner.graphs, "run", spy)
    monkeypatch.setattr(runner, "collect", listen)
    assert tokens(harness, GREEDY) == expected
    assert [result.in_halves for result in results] == [shape.in_halves for shape in shapes]
    assert {shape.num_tokens for shape in shapes if shape.in_halves} >= {2, 12}
    preempting(checkpoint, sizes)


@pytest.mark.parametrize(
    ("lengths", "whole"),
    [
        ([190, 15, 140, 40, 3, 120, 9], False),
        ([9, 15, 3, 40, 40, 190], False),  # of the second half alone
        ([190, 15, 140, 40, 3, 120, 9], True),
    ],
)
def test_halves_whose_rows_are_cut_or_not_change_no_token(
    checkpoint: Path, lengths: list[int], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_ROWS", 2)
    monkeypatch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_TOKENS", 1)
    monkeypatch.setattr("nanovllm.runner.step_graphs.MIN_ROWS_WHOLE", 1)
    monkeypatch.setattr("nanovllm.runner.decode_work.MIN_CHUNK", 64)
    monkeypatch.setattr("nanovllm.runner.decode_work.LONGEST_SHARE_BESIDE", 1e9 if whole else 0.3)
    prompts = random_prompts(lengths, seed=6)
    sizes = GraphSizes(decodes=[1, 2, 4, 10, 12], tokens=[24, 160, 600], sampled=[4, 12], in_halves=[2, 4, 10])
    harness = on_triton(checkpoint, max_num_batched_tokens=600, fixed_sizes=sizes)
    runner = harness.assembly.engine.runner
    assert isinstance(runner, ModelRunner)
    assert runner.graphs is not None
    assert runner._work is not None
    work, run = runner._work, runner.graphs.run
    cuts = set()

    def spy(shape: StepShape) -> torch.Tensor:
        if shape.in_halves:
            cuts.add(shape.cuts_rows)
            assert runner.graphs is not None
            inputs = runner.graphs._prepared[shape].inputs.tensors
            assert_apart(*work.halves(inputs, cuts_rows=shape.cuts_rows))
        return run(shape)

    monkeypatch.setattr(runner.graphs, "run", spy)
    got = [output.token_ids for output in harness.run(prompts, GREEDY)]
    assert got == [output.token_ids for output in build(checkpoint).run(prompts, GREEDY)]
    assert cuts == {not whole}


def assert_apart(first: DecodeWork, second: DecodeWork) -> None:
    """Two halves run at the same time: what one writes, or is written for it, is nothing of the other's."""
    for name in ("items", "merges", "partial_out", "partial_lse"):
        one, other = getattr(first, name), getattr(second, name)
        begin, end = other.data_ptr(), other.data_ptr() + other.numel() * other.element_size()
        most = len(first.items) if name.startswith("partial") else len(one)  # as many partials as items
        assert one.data_ptr() + one[:most].numel() * one.element_size() <= begin or one.data_ptr() >= end, name
    for name in ("num_items", "num_merges", "counters"):
        assert getattr(first, name).data_ptr() != getattr(second, name).data_ptr(), name
    assert second.counters.data_ptr() - first.counters.data_ptr() >= 4 * LAYERS


def test_prefixes_that_rows_share_are_read_apart(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.runner.shared_prefixes.MIN_SAVED_TOKENS", 64)
    seen = []
    for sizes in (None, SIZES):
        harness = on_triton(checkpoint, max_num_batched_tokens=72, fixed_sizes=sizes)
        work = harness.assembly.engine.runner._work  # pyright: ignore[reportAttributeAccessIssue]
        find = work._find_prefixes

        def spy(*args: object, find=find, work=work) -> None:
            find(*args)
            seen.append(sum(len(group.rows) for group in work._groups))

        monkeypatch.setattr(work, "_find_prefixes", spy)
        assert tokens(harness, GREEDY) == expected
        assert max(seen) >= 4
