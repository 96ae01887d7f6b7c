"""Block events in columns are the events that went in."""

import numpy as np

from nanovllm.engine.event_log import KIND_CODES, REASON_CODES, BlockEventLog
from nanovllm.events import ALLOCATE, COMMIT, EVICT, FINISHED, FREE, PREEMPTED, RELEASE, BlockEvent, BlockEvents

EVENTS = [
    BlockEvent(ALLOCATE, 0, 1, None, 1, None, 7),
    BlockEvent(COMMIT, 2**31 - 1, 2**63 - 1, None, 1, 2**64 - 1, 7),
    BlockEvent(RELEASE, 3, 1, PREEMPTED, 1, 0, 7),
    BlockEvent(FREE, 3, 2, FINISHED, 0, 0, 8),
    BlockEvent(EVICT, 3, 2, None, 0, 5, 8),
]


def test_events_come_out_as_they_went_in_one_by_one_and_in_slices() -> None:
    events = BlockEvents.of(EVENTS)

    assert list(events) == EVENTS
    assert (len(events), events[1], events[-1]) == (5, EVENTS[1], EVENTS[-1])
    assert list(events[1:3]) == EVENTS[1:3]
    assert events == BlockEvents.of(EVENTS) != events[1:]
    assert not BlockEvents.of([])
    assert all(type(value) is not np.generic for event in events for value in event)


def test_a_log_gives_what_was_added_since_it_was_drained() -> None:
    log = BlockEventLog()
    blocks = np.array([4, 5], np.int32)

    log.add(KIND_CODES[ALLOCATE], blocks, 9, ref_counts=1)
    log.add(
        np.array([KIND_CODES[FREE], KIND_CODES[RELEASE]]),
        blocks,
        np.array([9, 8]),
        reason=REASON_CODES[FINISHED],
        ref_counts=np.array([0, 1]),
        hashes=np.array([7, 0], np.uint64),
        has_hash=np.array([True, False]),
    )
    first = log.drain(3)

    assert list(first) == [
        BlockEvent(ALLOCATE, 4, 9, None, 1, None, 3),
        BlockEvent(ALLOCATE, 5, 9, None, 1, None, 2),
        BlockEvent(FREE, 4, 9, FINISHED, 0, 7, 3),
        BlockEvent(RELEASE, 5, 8, FINISHED, 1, None, 3),
    ]
    assert len(log.drain(3)) == 0
    log.add(KIND_CODES[ALLOCATE], blocks, 10, ref_counts=1)
    assert [event.seq_id for event in log.drain(3)] == [10, 10]
    assert first[0].seq_id == 9, "what was drained does not change"


def test_a_log_forgets_what_nobody_listens_to() -> None:
    log = BlockEventLog()
    log.add(KIND_CODES[ALLOCATE], np.array([4]), 9, ref_counts=1)

    log.discard()

    log.add(KIND_CODES[ALLOCATE], np.array([5]), 10, ref_counts=1)
    assert list(log.drain(2)) == [BlockEvent(ALLOCATE, 5, 10, None, 1, None, 2)]
