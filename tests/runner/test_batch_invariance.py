"""In float32 on a CPU a row's logits are the same bits whatever shares its batch and however its work is cut up."""

from pathlib import Path

import pytest
import torch

from nanovllm.sampling_params import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.runner.harness import Harness, build
from tests.runner.test_transformers_parity import random_prompts

NEEDLE = random_prompts([75], seed=1)[0]
CROWD = random_prompts([1 + (i * 37) % 90 for i in range(255)], seed=2)
SAMPLING = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=40, ignore_eos=True, seed=7)
NEEDLE_ROW = 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, hidden_size=96, intermediate_size=160, head_dim=64)
    return directory


def needle_logits(harness: Harness, batch_size: int, at: int = 0) -> torch.Tensor:
    """The needle's sampled-from logits in a batch of that size, the needle in place `at`."""
    crowd = CROWD[: batch_size - 1]
    prompts = [*crowd[:at], NEEDLE, *crowd[at:]]
    rows = [*range(at), NEEDLE_ROW, *range(at, len(crowd))]
    output = harness.run(prompts, SAMPLING, rows)[at]
    assert len(output.token_ids) == SAMPLING.max_tokens
    return torch.stack([harness.logits[NEEDLE_ROW, len(NEEDLE) + i] for i in range(len(output.token_ids))])


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> torch.Tensor:
    return needle_logits(build(checkpoint), 1)


@pytest.mark.parametrize(("batch_size", "at"), [(2, 1), (3, 0), (7, 3), (16, 15), (17, 9), (64, 1), (256, 200)])
def test_batch_size_and_place_change_no_bit(checkpoint: Path, alone: torch.Tensor, batch_size: int, at: int) -> None:
    assert torch.equal(needle_logits(build(checkpoint), batch_size, at), alone)


@pytest.mark.parametrize("budget", [1, 7, 16, 33, 64])
def test_chunked_prefill_changes_no_bit(checkpoint: Path, alone: torch.Tensor, budget: int) -> None:
    harness = build(checkpoint, max_num_seqs=1, max_num_batched_tokens=budget)
    assert torch.equal(needle_logits(harness, 1), alone)
    assert harness.counters.chunked_prefills > 0


@pytest.mark.parametrize("block_size", [1, 3, 64, 256])
def test_block_size_changes_no_bit(checkpoint: Path, alone: torch.Tensor, block_size: int) -> None:
    assert torch.equal(needle_logits(build(checkpoint, block_size=block_size), 5, 2), alone)


def test_a_prefix_hit_changes_no_bit(checkpoint: Path, alone: torch.Tensor) -> None:
    harness = build(checkpoint)
    harness.run([NEEDLE], SAMPLING, rows=[1])
    harness.logits.clear()
    assert torch.equal(needle_logits(harness, 9, 4), alone)
    assert harness.counters.cached_tokens >= 64


def test_preemption_changes_no_bit(checkpoint: Path, alone: torch.Tensor) -> None:
    harness = build(checkpoint, num_blocks=16)
    assert torch.equal(needle_logits(harness, 12, 9), alone)
    preempted = [p.seq_id for event in harness.counters.steps for p in event.schedule.preemptions]
    assert 9 in preempted


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(checkpoint: Path, alone: torch.Tensor, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(needle_logits(build(checkpoint), 64, 30), alone)
    finally:
        torch.set_num_threads(before)


def test_outside_these_rules_bits_do_change() -> None:
    """The control: were every matrix product the same whatever its rows, the tests above would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 256, generator=generator), torch.randn(512, 256, generator=generator)
    assert not torch.equal((x @ weight.T)[:1], x[:1] @ weight.T)
