"""Hit rates by prefix: requests whose first block is the same."""

from dataclasses import dataclass

import numpy as np

from jobs.analysis.ledger import KIND
from jobs.analysis.segments import Segment
from nanovllm.events import COMMIT, HIT


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixUse:
    """Requests that begin with the same block of tokens."""

    block_hash: int
    row: int
    """The first of their rows."""
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int


def prefix_uses(segments: list[Segment], most: int) -> tuple[list[PrefixUse], int]:
    """(the shared prefixes with the most requests, number of all that are shared); none where nothing was published."""
    found: dict[int, list[np.ndarray]] = {}
    for segment in segments:
        hashes, seq_ids = _first_blocks(segment)
        wanted = segment.request("seq_id")
        order = np.argsort(seq_ids, kind="stable")
        place = np.searchsorted(seq_ids[order], wanted)
        there = place < len(order)
        there[there] = seq_ids[order][place[there]] == wanted[there]
        names = ("row", "num_prompt_tokens", "num_cached_tokens")
        columns = np.stack([segment.request(name)[there] for name in names], axis=1)
        of_request = hashes[order][place[there]]
        for block_hash in np.unique(of_request):
            found.setdefault(int(block_hash), []).append(columns[of_request == block_hash])
    all_uses = (_use(block_hash, np.concatenate(parts)) for block_hash, parts in found.items())
    uses = [use for use in all_uses if use.num_requests > 1 or use.num_cached_tokens]
    return sorted(uses, key=lambda use: (-use.num_requests, use.row))[:most], len(uses)


def _use(block_hash: int, rows: np.ndarray) -> PrefixUse:
    return PrefixUse(
        block_hash=block_hash,
        row=int(rows[:, 0].min()),
        num_requests=len(rows),
        num_prompt_tokens=int(rows[:, 1].sum()),
        num_cached_tokens=int(rows[:, 2].sum()),
    )


def _first_blocks(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """(hash, seq_id) of each sequence whose first block was published or hit, once each."""
    events, ledger = segment.events, segment.ledger
    if ledger is None:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    is_first = ((events.kind == KIND[COMMIT]) | (events.kind == KIND[HIT])) & (ledger.column == 0)
    places = np.flatnonzero(is_first)
    seq_ids, once = np.unique(events.seq_id[places], return_index=True)
    return events.block_hash[places][once], seq_ids
