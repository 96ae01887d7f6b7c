"""A simulation that caches only what rows can find of one another comes to what it comes to with the whole cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.simulation import simulator
from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_rows import RecordedRows
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.simulator import Outcome, simulate
from nanovllm.engine.block_manager import BlockManager
from tests.jobs.synthetic_run import Row, write_run
from tests.jobs.test_simulated_leaps import COSTS, SMALL, WORLDS, World, alike

_TIGHT = replace(SMALL, num_blocks=60, max_model_len=512)
MORE = {
    "equal beginnings of less than a block": World(rows=alike(60, 15), equal_outputs=True),
    "equal beginnings of just a block": World(
        rows=[replace(row, num_prompt_tokens=40) for row in alike(60, 16)], equal_outputs=True
    ),
    "equal beginnings of less than a block, with preemptions": World(
        rows=alike(60, 15), settings=_TIGHT, equal_outputs=True
    ),
    "equal beginnings of some blocks, in a cache that holds all": World(
        rows=alike(60, 33), settings=replace(SMALL, num_blocks=2000), equal_outputs=True
    ),
    "several samples of a row": World(rows=[Row(num_prompt_tokens=40, num_output_tokens=20)] * 12),
}
ALL = WORLDS | MORE


def outcome_of(world: World, directory: Path, ledger: BlockLedger | None) -> Outcome:
    run = RecordedRun("run", directory)
    recorded = read_rows(run).rows
    if world.equal_outputs:
        recorded.output_tokens[recorded.output_tokens > 0] = 5
    return simulate(run.facts, recorded, COSTS, world.settings, ledger=ledger)


def counts(outcome: Outcome) -> list[object]:
    return [
        outcome.settings, outcome.num_steps, outcome.num_prompt_tokens, outcome.num_cached_tokens,
        outcome.num_output_tokens, outcome.num_preemptions, outcome.num_shorter, outcome.most_rows, outcome.most_tokens,
    ]  # fmt: skip


def caches_used(monkeypatch: pytest.MonkeyPatch) -> list[BlockManager]:
    """The block managers that are made from now on."""
    made: list[BlockManager] = []

    def making(*sizes: int, **options: Any) -> BlockManager:
        made.append(BlockManager(*sizes, **options))
        return made[-1]

    monkeypatch.setattr(simulator, "BlockManager", making)
    return made


@pytest.mark.parametrize("name", ALL)
def test_it_comes_to_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = ALL[name]
    write_run(tmp_path / "run", world.rows, COSTS, world.recorded or world.settings, on_gpu=world.on_gpu)
    with_cache = outcome_of(world, tmp_path / "run", BlockLedger())
    made = caches_used(monkeypatch)

    found = outcome_of(world, tmp_path / "run", None)

    assert counts(found) == counts(with_cache)
    times = [np.array([each.seconds, *each.latencies_s]) for each in (found, with_cache)]
    np.testing.assert_allclose(*times, rtol=0, atol=2e-9)  # a clock of nanoseconds
    block_size, num_blocks = world.settings.block_size, world.settings.num_blocks
    longest = max(row.shared_prefix_tokens for row in world.rows) // block_size
    if not world.settings.prefix_caching:
        assert [blocks.prefix_caching for blocks in made] == [False]
    else:
        assert [blocks.longest_prefix for blocks in made] in ([longest], [longest, None])
        assert made[0].prefix_caching == (longest > 0)
        may_evict = longest > 0 and made[0].num_taken > num_blocks
        assert len(made) == 1 + (with_cache.num_preemptions > 0 or may_evict)
    if "holds all" in name:
        assert len(made) == 1
        assert made[0].num_cached < made[0].num_taken / 4
    if "preemptions" in name:
        assert with_cache.num_preemptions > 3
    if name in MORE and "less than" not in name and "samples" not in name:
        assert with_cache.num_cached_tokens > 0


def test_samples_of_a_row_share_its_prompt(tmp_path: Path) -> None:
    write_run(tmp_path / "run", WORLDS["no prefix caching"].rows, COSTS, SMALL)
    recorded = read_rows(RecordedRun("run", tmp_path / "run")).rows
    assert recorded.longest_shared == 0
    recorded = read_rows(RecordedRun("run", tmp_path / "run")).rows
    recorded.sample[3] = 1
    assert recorded.longest_shared == recorded.num_prompt_tokens.max()


@pytest.mark.parametrize(
    "name",
    ["equal prompts", "equal beginnings of just a block", "equal beginnings of some blocks, in a cache that holds all"],
)
def test_rows_that_share_blocks_need_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    world = ALL[name]
    write_run(tmp_path / "run", world.rows, COSTS, world.settings)
    with_cache = outcome_of(world, tmp_path / "run", BlockLedger())
    monkeypatch.setattr(RecordedRows, "longest_shared", 15)
    assert counts(outcome_of(world, tmp_path / "run", None)) != counts(with_cache)


def test_a_preempted_row_needs_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: it finds what it has left there, or what another row has left with the same output."""
    world = MORE["equal beginnings of less than a block, with preemptions"]
    write_run(tmp_path / "run", world.rows, COSTS, world.settings)
    with_cache = outcome_of(world, tmp_path / "run", BlockLedger())
    monkeypatch.setattr(simulator._Simulation, "_cache_may_matter", lambda self: False)
    without = outcome_of(world, tmp_path / "run", None)
    assert without.num_preemptions > 3
    assert without.seconds != pytest.approx(with_cache.seconds, abs=2e-9)
