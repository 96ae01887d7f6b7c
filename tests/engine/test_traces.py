"""Random traces against a shadow KV cache: every step keeps the laws, every output equals the sequential reference."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.engine.traces import run_traces

AT_LEAST_PER_1000_TRACES = {
    "steps": 10_000,
    "preemptions": 200,
    "preemptions in flight": 150,
    "tokens kept of the preempted": 150,
    "re-admissions": 150,
    "prefix hits": 1000,
    "prefix hits after preemption": 100,
    "identical prompts in a step": 250,
    "chunked prefills": 2000,
    "mixed steps": 1000,
    "published blocks": 4000,
    "evictions": 1000,
    "drops": 700,
    "refusals": 200,
    "ends by stop": 500,
    "ends by length": 1500,
    "ends by error": 80,
    "aborts in flight": 100,
    "aborts while running": 150,
    "aborts while preempted": 20,
    "aborts while preempted and in flight": 4,
    "aborts before running": 150,
    "abort_all": 15,
}
"""About half of what was seen. A suite whose stress does not happen proves nothing."""


def run_in_two_processes(num_traces: int, first_seed: int, hash_bits: int) -> Counter[str]:
    seeds = range(first_seed, first_seed + num_traces)
    parts = [seeds[at : at + 250] for at in range(0, num_traces, 250)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        return sum(processes.map(run_traces, parts, [hash_bits] * len(parts)), Counter())


def assert_stress_happened(seen: Counter[str], num_traces: int) -> None:
    assert seen["traces"] == num_traces
    missed = {
        name: f"{seen[name]} of {least * num_traces // 1000}"
        for name, least in AT_LEAST_PER_1000_TRACES.items()
        if seen[name] < least * num_traces // 1000
    }
    assert not missed, f"too little of: {missed}"


@pytest.mark.parametrize(
    ("num_traces", "first_seed"),
    [(6000, 0), pytest.param(200_000, 1_000_000, marks=pytest.mark.slow)],
    ids=["6000", "200000"],
)
def test_random_traces_keep_every_law_and_equal_the_sequential_reference(num_traces: int, first_seed: int) -> None:
    seen = run_in_two_processes(num_traces, first_seed, hash_bits=64)

    assert_stress_happened(seen, num_traces)
    assert seen["hash collisions"] == 0


@pytest.mark.parametrize(
    ("hash_bits", "num_traces", "first_seed", "least_collisions"),
    [
        (6, 3000, 10_000, 100),
        (1, 1000, 20_000, 600),
        pytest.param(6, 100_000, 2_000_000, 3000, marks=pytest.mark.slow),
    ],
    ids=["6-bit", "1-bit", "6-bit-long"],
)
def test_colliding_hashes_never_serve_another_prefix(
    hash_bits: int, num_traces: int, first_seed: int, least_collisions: int
) -> None:
    """With so short a hash most lookups meet a foreign block; tokens and parent must tell them apart."""
    seen = run_in_two_processes(num_traces, first_seed, hash_bits)

    assert_stress_happened(seen, num_traces)
    assert seen["hash collisions"] >= least_collisions
