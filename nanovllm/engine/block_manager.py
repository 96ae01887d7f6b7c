"""KV blocks: reference counts, a prefix index over full blocks, and eviction of the least recently used."""

from collections import deque
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import xxhash

from nanovllm.engine.event_log import KIND_CODES, BlockEventLog
from nanovllm.engine.free_blocks import CachedBlocks, EmptyBlocks
from nanovllm.events import ALLOCATE, COMMIT, EVICT, FREE, HIT, RELEASE, BlockEvents

ROOT = 0
"""Content number of the empty prefix, and of a block that holds no published one."""
CUT = -1
"""In place of a content number: a hash collision has ended the chain, and no more blocks are published."""
_ALLOCATE, _COMMIT, _EVICT, _FREE, _HIT, _RELEASE = (
    KIND_CODES[kind] for kind in (ALLOCATE, COMMIT, EVICT, FREE, HIT, RELEASE)
)
_NO_BLOCKS = np.empty(0, np.intp)


class PublishRuns(NamedTuple):
    """Consecutive blocks of one sequence each, at least one; int64 [runs]."""

    seq_ids: np.ndarray
    parents: np.ndarray
    """The content number of the block before them."""
    counts: np.ndarray


class _Lookup(NamedTuple):
    """What was found of a prompt; it is there still if nothing has been evicted since."""

    token_ids: np.ndarray
    hashes: list[int]
    blocks: np.ndarray
    num_evictions: int


class BlockManager:
    """Hands out the blocks of one KV cache and remembers whose prefix they hold.

    A block is in exactly one of three states: in use (reference count above 0), empty, or cached (no user, but its
    prefix can still be reused). Empty blocks are taken first, then the cached one that was used longest ago.

    A published block gets a content number that is never given out again. The index maps (content number of the
    parent block, hash of the whole prefix) to a block, and a hit also compares the block's own tokens, or those of the
    prompt that they have just been compared with. By induction over the chain a hit therefore holds exactly the wanted
    prefix, whatever the hash does.

    State is kept in arrays, and blocks are taken, hit, published and given back many at a time: a step may admit a
    hundred prompts of a hundred blocks. Block ids come and go as intp arrays, which index without being converted.

    Every change is recorded in the order in which it happens; the owner drains the events.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        longest_prefix: int | None = None,
        hash_bits: int = 64,
    ) -> None:
        """`longest_prefix`: only so many blocks of a sequence are looked up and offered for reuse; None: all."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.longest_prefix = longest_prefix
        self._log = BlockEventLog()
        self._hash_mask = (1 << hash_bits) - 1
        self._empty = EmptyBlocks(num_blocks)
        self._cached = CachedBlocks(num_blocks)
        self._ref_counts = np.zeros(num_blocks, np.int32)
        self._hashes = np.zeros(num_blocks, np.uint64)
        self._contents = np.full(num_blocks, ROOT, np.int64)
        self._parents = np.full(num_blocks, ROOT, np.int64)
        self._tokens = np.zeros((num_blocks, block_size), np.int32)
        self._index: dict[tuple[int, int], int] = {}
        self.num_taken = 0
        """Blocks that have been taken since the beginning, given back or not; a hit takes none."""
        self._last_content = ROOT
        self._num_evictions = 0
        self._last_lookup = _Lookup(np.empty(0, np.int32), [], _NO_BLOCKS, 0)
        self._places = np.empty(num_blocks, np.intp)  # scratch: where a block stands in what is being freed

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_empty(self) -> int:
        """Blocks that can be taken without giving up a prefix."""
        return len(self._empty)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def events(self) -> BlockEvents:
        """What has happened since the events were drained."""
        return self._log.events(self.num_free)

    def drain_events(self) -> BlockEvents:
        return self._log.drain(self.num_free)

    def discard_events(self) -> None:
        self._log.discard()

    def extend_hashes(self, hashes: list[int], tokens: bytes) -> None:
        """Append the chained hash of each whole block of `tokens`, which follow on those that `hashes` are of.

        The hash of a prefix is that of the prefix without its last block (0 without one) and that block's tokens.
        """
        size, mask, digest = 4 * self.block_size, self._hash_mask, xxhash.xxh64_intdigest
        last = hashes[-1] if hashes else 0
        for at in range(0, len(tokens), size):
            last = digest(last.to_bytes(8, "little") + tokens[at : at + size]) & mask
            hashes.append(last)

    def next_hashes(self, chains: list[list[int]], tokens: bytes) -> list[int]:
        """As extend_hashes, of many chains, each by one block of `tokens`; what has been appended to each."""
        size, mask, digest = 4 * self.block_size, self._hash_mask, xxhash.xxh64_intdigest
        hashes: list[int] = []
        at = 0
        for chain in chains:
            last = chain[-1] if chain else 0
            new = digest(last.to_bytes(8, "little") + tokens[at : at + size]) & mask
            chain.append(new)
            hashes.append(new)
            at += size
        return hashes

    def find_prefix(self, token_ids: np.ndarray, hashes: list[int], num_blocks: int) -> np.ndarray:
        """Blocks that hold the first `num_blocks` full blocks of `token_ids`, as many as are there; takes none of them.

        `hashes`, chained ones of leading full blocks, grow until there are `num_blocks` of them.

        Prompts that begin alike often come one after the other: what is common with the last one is not hashed, looked
        up and compared again, and where both find the same blocks, the same array is returned. So nobody may change
        `token_ids` afterwards.
        """
        if not self.prefix_caching:
            return _NO_BLOCKS
        if self.longest_prefix is not None:
            num_blocks = min(num_blocks, self.longest_prefix)
        last, size = self._last_lookup, self.block_size
        num_common = min(_num_common(last.token_ids, token_ids) // size, num_blocks)
        if len(hashes) < num_blocks:
            if not hashes:
                hashes += last.hashes[:num_common]
            self.extend_hashes(hashes, token_ids[len(hashes) * size : num_blocks * size].tobytes())
        found = last.blocks if last.num_evictions == self._num_evictions else _NO_BLOCKS
        if len(found) > num_common:
            found = found[:num_common]
        parent = self.content_of(found[-1]) if len(found) else ROOT
        more = self._walk(parent, hashes[len(found) : num_blocks])
        if more:
            wanted = token_ids[len(found) * size : (len(found) + len(more)) * size]
            found = np.concatenate([found, self._holding(np.array(more, np.intp), wanted)])
        self._last_lookup = _Lookup(token_ids, hashes, found, self._num_evictions)
        return found

    def _walk(self, parent: int, hashes: list[int]) -> list[int]:
        found: list[int] = []
        for prefix_hash in hashes:
            block = self._index.get((parent, prefix_hash))
            if block is None:
                break
            found.append(block)
            parent = self.content_of(block)
        return found

    def _holding(self, blocks: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """The leading ones of `blocks` that hold `token_ids`, which fill them all."""
        held = self._tokens[blocks]
        if held.tobytes() == token_ids.tobytes():
            return blocks
        differs = (held != token_ids.reshape(-1, self.block_size)).any(axis=1)
        return blocks[: differs.argmax()]

    def num_unused(self, blocks: np.ndarray) -> int:
        """How many of `blocks` nobody uses: taking these lowers num_free."""
        return len(blocks) - int(np.count_nonzero(self._ref_counts[blocks])) if len(blocks) else 0

    def content_of(self, block: int) -> int:
        """Content number of a published block."""
        return self._contents.item(block)

    def hit(self, seq_ids: int | np.ndarray, blocks: np.ndarray) -> None:
        """Add one sequence, or one after the other, to the users of blocks that `find_prefix` has returned.

        Nothing may have been evicted in between.
        """
        counts, hashes = self._ref_counts[blocks], self._hashes[blocks]
        if np.count_nonzero(counts) < len(counts):
            self._cached.remove(blocks[counts == 0])
        if isinstance(seq_ids, int):
            self._ref_counts[blocks] = counts = counts + 1
        else:
            num_users = len(seq_ids)
            counts = (counts + np.arange(1, num_users + 1, dtype=np.int32)[:, None]).reshape(-1)
            self._ref_counts[blocks] = counts[-len(blocks) :]
            seq_ids = seq_ids.repeat(len(blocks))
            blocks, hashes = np.tile(blocks, num_users), np.tile(hashes, num_users)
        self._log.add(_HIT, blocks, seq_ids, ref_counts=counts, hashes=hashes, has_hash=True)

    def allocate(self, seq_ids: np.ndarray) -> np.ndarray:
        """Take a block for each of `seq_ids`, which may repeat; the caller has checked that so many are free."""
        count = len(seq_ids)
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free"
        self.num_taken += count
        num_empty = min(count, len(self._empty))
        blocks = self._empty.take(num_empty)
        self._ref_counts[blocks] = 1
        self._log.add(_ALLOCATE, blocks, seq_ids[:num_empty], ref_counts=1)
        if num_empty == count:
            return blocks
        return np.concatenate([blocks, self._evict(seq_ids[num_empty:])])

    def _evict(self, seq_ids: np.ndarray) -> np.ndarray:
        """Take the cached blocks used longest ago; each is given up just before it is taken."""
        count = len(seq_ids)
        blocks = self._cached.take(count)
        self._num_evictions += count
        hashes = self._hashes[blocks]
        keys = zip(self._parents[blocks].tolist(), hashes.tolist(), strict=True)
        deque(map(self._index.__delitem__, keys), maxlen=0)
        self._contents[blocks] = ROOT
        self._ref_counts[blocks] = 1
        turns = np.arange(2 * count) % 2  # 0 where the block is given up, 1 where it is taken
        self._log.add(
            np.where(turns, _ALLOCATE, _EVICT),
            blocks.repeat(2),
            seq_ids.repeat(2),
            ref_counts=turns,
            hashes=hashes.repeat(2),
            has_hash=turns == 0,
        )
        return blocks

    def publish(self, runs: PublishRuns, blocks: np.ndarray, hashes: list[int], tokens: np.ndarray) -> np.ndarray:
        """Offer full blocks for reuse; for each run the content number of its whole prefix, int64 [runs].

        `blocks` [blocks], `hashes` and `tokens` [blocks, block size] are those of all runs, one after the other.

        Where another block already holds the same prefix, that one stays in the index and its number goes on. CUT,
        and nothing more of the run published, when another content has the same parent and hash: the chain ends there.
        """
        if len(blocks) == len(runs.counts):  # as in a decode step
            seq_ids, parents, last = runs.seq_ids, runs.parents, slice(None)
        else:
            # As if the first block of each run were new: what follows on a content number given out here is new too.
            seq_ids, ends = runs.seq_ids.repeat(runs.counts), runs.counts.cumsum()
            parents, last = np.arange(self._last_content, self._last_content + len(blocks)), ends - 1
            parents[ends - runs.counts] = runs.parents
        new = dict(zip(zip(parents.tolist(), hashes, strict=True), blocks.tolist(), strict=True))
        if len(new) < len(blocks) or not self._index.keys().isdisjoint(new):
            return self._publish_one_by_one(runs, blocks, hashes, tokens)
        self._index.update(new)
        return self._store(blocks, seq_ids, parents, hashes, tokens)[last]

    def _publish_one_by_one(
        self, runs: PublishRuns, blocks: np.ndarray, hashes: list[int], tokens: np.ndarray
    ) -> np.ndarray:
        """As publish, where some of the prefixes are held by other blocks, or by one another's."""
        contents: list[int] = []
        end = 0
        for seq_id, content, count in zip(*(column.tolist() for column in runs), strict=True):
            at, end = end, end + count
            while at < end and content != CUT:
                known = self._index.get((content, hashes[at]))
                if known is None:
                    break
                content = self.content_of(known) if (self._tokens[known] == tokens[at]).all() else CUT
                at += 1
            if at < end and content != CUT:
                rest = PublishRuns(np.array([seq_id]), np.array([content]), np.array([end - at]))
                content = self.publish(rest, blocks[at:end], hashes[at:end], tokens[at:end]).item()
            contents.append(content)
        return np.array(contents)

    def _store(
        self,
        blocks: np.ndarray,
        seq_ids: np.ndarray,
        parents: np.ndarray,
        hashes: list[int],
        tokens: np.ndarray,
    ) -> np.ndarray:
        """Write down what newly published blocks hold; their content numbers, which are given out here."""
        first, self._last_content = self._last_content + 1, self._last_content + len(blocks)
        contents = np.arange(first, first + len(blocks))
        hash_array = np.array(hashes, np.uint64)
        self._hashes[blocks] = hash_array
        self._parents[blocks] = parents
        self._contents[blocks] = contents
        self._tokens[blocks] = tokens
        self._log.add(
            _COMMIT,
            blocks,
            seq_ids,
            ref_counts=self._ref_counts[blocks],
            hashes=hash_array,
            has_hash=True,
        )
        return contents

    def free(self, owners: np.ndarray, blocks: np.ndarray, reasons: np.ndarray) -> int:
        """Take each owner, a sequence, off the users of its block; returns how many blocks have no user left.

        All [blocks], reasons as REASON_CODES. The caller goes from a sequence's last block to its first, so that a
        prefix is evicted from its end and never loses its beginning first.
        """
        counts = self._ref_counts[blocks] - 1 - self._times_before(blocks, owners)
        if np.count_nonzero(counts < 0):
            raise _freed_too_often(int(blocks[counts.argmin()]))
        free_before = self.num_free
        self._ref_counts[blocks] = counts  # of a block that comes several times, the last one stays
        if not self.prefix_caching:  # so none has another user
            self._empty.put(blocks)
            self._log.add(_FREE, blocks, owners, reason=reasons, ref_counts=counts)
            return len(blocks)
        freed, has_hash = counts == 0, self._contents[blocks] != ROOT
        self._empty.put(blocks[freed & ~has_hash])
        self._cached.put(blocks[freed & has_hash])
        self._log.add(
            np.where(freed, _FREE, _RELEASE),
            blocks,
            owners,
            reason=reasons,
            ref_counts=counts,
            hashes=self._hashes[blocks],
            has_hash=has_hash,
        )
        return self.num_free - free_before

    def _times_before(self, blocks: np.ndarray, owners: np.ndarray) -> int | np.ndarray:
        """How often each of `blocks` has come before in it, never of the same owner."""
        places = np.arange(len(blocks))
        self._places[blocks] = places
        if np.array_equal(self._places[blocks], places):
            return 0
        by_block = blocks.argsort(kind="stable")
        is_again = np.zeros(len(blocks), np.bool_)
        is_again[1:] = blocks[by_block[1:]] == blocks[by_block[:-1]]
        twice = is_again[1:] & (owners[by_block[1:]] == owners[by_block[:-1]])
        if np.count_nonzero(twice):
            raise _freed_too_often(int(blocks[by_block[1:][twice][0]]))
        first = np.maximum.accumulate(np.where(is_again, 0, places))
        times = np.empty(len(blocks), np.int32)
        times[by_block] = places - first
        return times

    def check_integrity(self, tables: Items[Items[int]]) -> None:
        """Raise AssertionError, with the numbers, unless the blocks are conserved.

        `tables` are the block tables of all live sequences.
        """
        users = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block stands twice in one table: {table}"
            for block in table:
                users[block] += 1
        ref_counts, contents = self._ref_counts.tolist(), self._contents.tolist()
        assert users == ref_counts, f"reference counts {ref_counts} but live tables give {users}"
        empty, cached = self._empty.tolist(), self._cached.tolist()
        assert len(cached) == len(self._cached), f"{len(cached)} blocks are cached, not {len(self._cached)}"
        unused = empty + cached
        assert len(unused) == len(set(unused)), "a block is free twice"
        assert sorted(unused) == [b for b in range(self.num_blocks) if not users[b]], "free + used is not the total"
        assert all(contents[b] == ROOT for b in empty), "an empty block still has a prefix"
        published = {b for b in range(self.num_blocks) if contents[b] != ROOT}
        assert set(self._index.values()) == published, "the index and the published blocks differ"
        assert len(self._index) == len(published), "a block stands in the index twice"
        assert set(cached) <= published, "a cached block is not in the index"


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the longest common beginning."""
    count = min(len(first), len(second))
    differs = first[:count] != second[:count]
    place = int(differs.argmax()) if count else 0
    return place if count and differs[place] else count


def _freed_too_often(block: int) -> AssertionError:
    return AssertionError(f"block {block} freed more often than it was taken")
