"""The harness sees bugs: each seeded one is caught within a bounded number of traces."""

from collections import Counter

import pytest

from nanovllm.engine.block_manager import BlockManager
from tests.engine.mutants import ENGINE, MUTANTS, Mutant
from tests.engine.traces import random_trace, run_trace

MOST_TRACES = 600


def trace_that_catches(mutant: Mutant) -> int | None:
    with mutant.planted():
        for seed in range(MOST_TRACES):
            try:
                run_trace(random_trace(seed), Counter(), hash_bits=mutant.hash_bits, with_ledger=True)
            except Exception:  # a bug may break anything: a law, an index, the engine's own assertions
                return seed
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_seeded_bug_is_caught(mutant: Mutant) -> None:
    assert trace_that_catches(mutant) is not None, f"{MOST_TRACES} traces passed although {mutant.name}"


@pytest.mark.parametrize("hash_bits", [64, 6, 1])
def test_the_engine_as_it_is_passes_the_traces_that_catch_the_bugs(hash_bits: int) -> None:
    """The control: without it, a harness that fails always would seem to catch everything."""
    for seed in range(150):
        run_trace(random_trace(seed), Counter(), hash_bits=hash_bits, with_ledger=True)


def test_a_mutant_is_the_engine_with_one_method_changed() -> None:
    mutant = next(m for m in MUTANTS if m.changes[0][0] == "free")
    before = {cls: dict(vars(cls)) for cls in ENGINE}

    with mutant.planted():
        planted = {(cls, name) for cls in ENGINE for name, value in vars(cls).items() if value is not before[cls][name]}

    assert planted == {(BlockManager, "free")}
    assert {cls: dict(vars(cls)) for cls in ENGINE} == before, "the engine itself is left alone"
