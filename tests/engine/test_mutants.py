"""The harness sees bugs: each seeded one is caught within a bounded number of traces."""

from collections import Counter

import pytest

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from tests.engine.mutants import MUTANTS, Mutant
from tests.engine.traces import random_trace, run_trace

MOST_TRACES = 600


def trace_that_catches(mutant: Mutant) -> int | None:
    block_manager, scheduler = mutant.block_manager(), mutant.scheduler()
    for seed in range(MOST_TRACES):
        try:
            run_trace(
                random_trace(seed),
                Counter(),
                hash_bits=mutant.hash_bits,
                block_manager=block_manager,
                scheduler=scheduler,
                with_ledger=True,
            )
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

    assert issubclass(mutant.block_manager(), BlockManager)
    assert list(vars(mutant.block_manager())).count("free") == 1
    assert "free" not in vars(mutant.scheduler())
    assert issubclass(mutant.scheduler(), Scheduler)
