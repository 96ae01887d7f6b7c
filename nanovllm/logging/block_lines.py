"""Lines about KV blocks: one for each time that a sequence takes blocks or gives them back."""

import logging
from collections.abc import Iterable
from itertools import groupby

from nanovllm.events import ALLOCATE, FREE, HIT, RELEASE, BlockEvent, BlockEvents
from nanovllm.logging.lines import BLOCKS

_TAKES = (ALLOCATE, HIT)
_GIVES = (FREE, RELEASE)


def log_block_events(events: BlockEvents, num_blocks: int) -> None:
    """DEBUG lines of `events`, in their order; `num_blocks` is the size of the cache."""
    if not events or not BLOCKS.isEnabledFor(logging.DEBUG):
        return
    shown = (event for event in events if event.event in _TAKES or event.event in _GIVES)
    for (seq_id, taken), group in groupby(shown, key=lambda event: (event.seq_id, event.event in _TAKES)):
        if taken:
            _log_taken(seq_id, list(group), num_blocks)
        else:
            _log_given_back(seq_id, list(group))


def _log_taken(seq_id: int, events: list[BlockEvent], num_blocks: int) -> None:
    hits = _count(events, HIT)
    free = events[-1].free_blocks
    BLOCKS.debug(f"Allocating blocks for seq_id={seq_id}, num_blocks={len(events)}")
    BLOCKS.debug(
        f"Allocated blocks for seq_id={seq_id}: new={len(events) - hits}, cache_hits={hits}, "
        f"free_blocks={free}, used_blocks={num_blocks - free}"
    )


def _log_given_back(seq_id: int, events: list[BlockEvent]) -> None:
    BLOCKS.debug(
        f"Deallocated blocks for seq_id={seq_id}: freed={_count(events, FREE)}/{len(events)}, "
        f"free_blocks={events[-1].free_blocks}"
    )


def _count(events: Iterable[BlockEvent], kind: str) -> int:
    return sum(event.event == kind for event in events)
