"""The benchmark's workloads: what other engines were measured on, and what a small model can be given."""

import hashlib

import numpy as np
import pytest

from jobs.workloads import WORKLOADS, Sizes, Workload

NAMES = list(WORKLOADS)
PUBLISHED = {
    "nano": "321663bfb3a301ab",
    "many": "9c5ff6e5eab1c386",
    "short": "f7669bfd76b4e44e",
    "shared": "283c212d88bd810d",
    "long": "7d9d6ac16cdf7bda",
}
SMALL = Sizes(scale=0.02, vocab_size=1600)


def digest(load: Workload) -> str:
    """Of every length and id in order."""
    seen = hashlib.sha256()
    for row in [*load.prompts, load.output_lens]:
        seen.update(np.array([len(row), *row], np.int32).tobytes())
    return seen.hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_seed_1_draws_the_ids_that_the_published_figures_were_measured_on(name: str):
    load = WORKLOADS[name].build(1, Sizes(vocab_size=151_936))
    assert digest(load) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_says_everything_and_another_one_shares_no_prompt(name: str):
    first, again, other = (WORKLOADS[name].build(seed, SMALL) for seed in (3, 3, 4))
    assert first == again
    assert not {tuple(p) for p in first.prompts} & {tuple(p) for p in other.prompts}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.001, 0.02, 0.13])
def test_a_small_model_gets_ids_that_it_has_and_no_sequence_is_longer_than_promised(name: str, scale: float):
    kind, sizes = WORKLOADS[name], Sizes(scale=scale, vocab_size=1600)
    load = kind.build(1, sizes)
    assert max(map(max, load.prompts)) < 1600
    assert min(map(min, load.prompts)) >= 0
    lengths = [p + o for p, o in zip(load.prompt_lens, load.output_lens, strict=True)]
    assert max(lengths) <= kind.longest_len(sizes)
    assert min(load.prompt_lens) >= 1
    assert min(load.output_lens) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_mirrored_workload_is_the_same_work_on_other_prompts(name: str):
    load = WORKLOADS[name].build(1, SMALL)
    mirrored = load.mirrored(SMALL.top_id)
    assert mirrored.prompt_lens == load.prompt_lens
    assert mirrored.output_lens == load.output_lens
    assert mirrored.num_shared == load.num_shared
    assert not {tuple(p) for p in load.prompts} & {tuple(p) for p in mirrored.prompts}
    assert mirrored.mirrored(SMALL.top_id) == load


def test_the_shared_workload_shares_its_prefix_and_nothing_more():
    load = WORKLOADS["shared"].build(1, SMALL)
    assert len({tuple(p[: load.num_shared]) for p in load.prompts}) == 1
    assert len({tuple(p) for p in load.prompts}) == len(load.prompts)


@pytest.mark.parametrize("name", NAMES)
def test_unscaled_sequences_are_as_long_as_promised(name: str):
    kind = WORKLOADS[name]
    assert kind.longest_len(Sizes()) == {"nano": 2048, "many": 384, "short": 520, "shared": 2240, "long": 8704}[name]
