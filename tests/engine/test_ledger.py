"""The block events alone rebuild the pool: what the tables of a run say is what the engine did."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from nanovllm.events import ALLOCATE, COMMIT, EVICT, FINISHED, FREE, HIT, PREEMPTED, RELEASE, BlockEvent
from tests.engine.ledger import Ledger, LedgerError, tables_at_steps
from tests.engine.traces import random_trace, run_trace, run_traces


@pytest.mark.parametrize("first_seed", [30_000, 30_300, 30_600, 30_900])
def test_block_events_replay_to_the_tables_that_the_runner_used(first_seed: int) -> None:
    """Tables at every step, reference counts, free and cached blocks, hashes, tokens, cached tokens, preemptions."""
    seen = run_traces(range(first_seed, first_seed + 300), with_ledger=True)

    assert min(seen[what] for what in ("preemptions", "evictions", "drops", "prefix hits", "ends by error")) > 20


def test_block_events_replay_when_hashes_collide() -> None:
    seen = run_traces(range(31_200, 31_400), hash_bits=6, with_ledger=True)

    assert seen["hash collisions"] > 3


@pytest.mark.parametrize("lookahead", [0, 1])
def test_block_events_replay_with_and_without_lookahead(lookahead: int) -> None:
    seen: Counter[str] = Counter()

    for seed in range(31_400, 31_550):
        run_trace(replace(random_trace(seed), lookahead=lookahead), seen, with_ledger=True)

    assert seen["preemptions"] > 20
    assert (seen["drops"] > 0) == (lookahead > 0), "only look-ahead can throw a token away"


def _event(
    event: str, block: int, seq_id: int, ref: int, free: int, block_hash: int | None = None, reason: str | None = None
) -> BlockEvent:
    return BlockEvent(event, block, seq_id, reason, ref, block_hash, free)


LIFE_OF_A_BLOCK = (
    _event(ALLOCATE, 0, 1, ref=1, free=1),
    _event(COMMIT, 0, 1, ref=1, free=1, block_hash=9),
    _event(HIT, 0, 2, ref=2, free=1, block_hash=9),
    _event(RELEASE, 0, 1, ref=1, free=1, block_hash=9, reason=PREEMPTED),
    _event(FREE, 0, 2, ref=0, free=2, block_hash=9, reason=FINISHED),
    _event(EVICT, 0, 3, ref=0, free=2, block_hash=9),
    _event(ALLOCATE, 0, 3, ref=1, free=1),
)


def test_a_block_goes_through_its_life() -> None:
    ledger = Ledger(num_blocks=2)

    states = []
    for event in LIFE_OF_A_BLOCK:
        ledger.apply(event)
        states.append(
            ({seq_id: list(table) for seq_id, table in ledger.tables.items()}, ledger.free_blocks, ledger.cached_blocks)
        )

    assert states == [
        ({1: [0]}, 1, 0),
        ({1: [0]}, 1, 0),
        ({1: [0], 2: [0]}, 1, 0),
        ({2: [0]}, 1, 0),
        ({}, 2, 1),
        ({}, 2, 0),
        ({3: [0]}, 1, 0),
    ]


def replay(events: Iterable[BlockEvent]) -> None:
    ledger = Ledger(num_blocks=2)
    for event in events:
        ledger.apply(event)


@pytest.mark.parametrize("missing", range(len(LIFE_OF_A_BLOCK) - 1))
def test_a_missing_event_is_noticed(missing: int) -> None:
    with pytest.raises(LedgerError):
        replay(LIFE_OF_A_BLOCK[:missing] + LIFE_OF_A_BLOCK[missing + 1 :])


@pytest.mark.parametrize("at", range(len(LIFE_OF_A_BLOCK)))
@pytest.mark.parametrize(
    "claim",
    [{"ref_count": 7}, {"free_blocks": 0}, {"block_hash": 8}, {"block_id": 1}, {"block_id": 2}, {"event": "lost"}],
    ids=str,
)
def test_a_false_claim_is_noticed(at: int, claim: dict[str, object]) -> None:
    events = list(LIFE_OF_A_BLOCK)
    events[at] = events[at]._replace(**claim)

    with pytest.raises(LedgerError):
        replay([*events, _event(FREE, 0, 3, ref=0, free=2, reason=FINISHED)])


def test_tables_at_a_step_hold_what_was_taken_before_it_and_given_back_after_it() -> None:
    """As with look-ahead: step 1 is scheduled, and takes a block, before step 0 is committed."""
    rows = [
        (0, _event(ALLOCATE, 0, 1, ref=1, free=2)),
        (0, _event(ALLOCATE, 1, 2, ref=1, free=1)),
        (1, _event(ALLOCATE, 2, 2, ref=1, free=0)),
        (0, _event(FREE, 0, 1, ref=0, free=1, reason=FINISHED)),
        (2, _event(FREE, 2, 2, ref=0, free=2, reason=FINISHED)),
    ]

    used = tables_at_steps({0: [1, 2], 1: [2], 2: [2]}, rows)

    assert used == {0: {1: [0], 2: [1]}, 1: {2: [1, 2]}, 2: {2: [1, 2]}}
