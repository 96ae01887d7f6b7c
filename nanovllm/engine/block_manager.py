"""KV blocks: reference counts, a prefix index over full blocks, and eviction of the least recently used."""

from collections import OrderedDict
from collections.abc import Sequence as Items

import numpy as np
import xxhash

from nanovllm.events import ALLOCATE, COMMIT, EVICT, FREE, HIT, RELEASE, BlockEvent

ROOT = 0
"""Content number of the empty prefix."""


class BlockManager:
    """Hands out the blocks of one KV cache and remembers whose prefix they hold.

    A block is in exactly one of three states: in use (reference count above 0), empty, or cached (no user, but its
    prefix can still be reused). Empty blocks are taken first, then the cached one that was used longest ago.

    A published block gets a content number that is never given out again. The index maps (content number of the
    parent block, hash of the whole prefix) to a block, and a hit also compares the block's own tokens. By induction
    over the chain a hit therefore holds exactly the wanted prefix, whatever the hash does.

    Every change is appended to `events` in the order in which it happens; the owner drains the list.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, hash_bits: int = 64) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.events: list[BlockEvent] = []
        self._hash_mask = (1 << hash_bits) - 1
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._ref_counts = [0] * num_blocks
        self._hashes: list[int | None] = [None] * num_blocks
        self._contents = [ROOT] * num_blocks
        self._parents = [ROOT] * num_blocks
        self._tokens: list[bytes] = [b""] * num_blocks
        self._index: dict[tuple[int, int], int] = {}
        self._last_content = ROOT

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def chain_hash(self, parent_hash: int, tokens: bytes) -> int:
        """Hash of a prefix from the hash of all but its last block (0 without one) and that block's tokens."""
        return xxhash.xxh64_intdigest(parent_hash.to_bytes(8, "little") + tokens) & self._hash_mask

    def extend_hashes(self, hashes: list[int], token_ids: np.ndarray, num_blocks: int) -> None:
        """Grow the chained hashes of `token_ids`' leading full blocks until there are `num_blocks` of them."""
        size = self.block_size
        for i in range(len(hashes), num_blocks):
            tokens = token_ids[i * size : (i + 1) * size].tobytes()
            hashes.append(self.chain_hash(hashes[-1] if hashes else 0, tokens))

    def find_prefix(self, token_ids: np.ndarray, hashes: Items[int]) -> list[int]:
        """Blocks that hold the leading full blocks of `token_ids`, as many as are there; takes none of them."""
        found: list[int] = []
        if not self.prefix_caching:
            return found
        parent, size = ROOT, self.block_size
        for i, prefix_hash in enumerate(hashes):
            block = self._index.get((parent, prefix_hash))
            if block is None or self._tokens[block] != token_ids[i * size : (i + 1) * size].tobytes():
                break
            found.append(block)
            parent = self._contents[block]
        return found

    def num_unused(self, blocks: Items[int]) -> int:
        """How many of `blocks` nobody uses: taking these lowers num_free."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def content_of(self, block: int) -> int:
        """Content number of a published block."""
        return self._contents[block]

    def hit(self, seq_id: int, blocks: Items[int]) -> None:
        """Add `seq_id` to the users of blocks that `find_prefix` has just returned."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1
            self._record(HIT, block, seq_id, None)

    def allocate(self, seq_id: int, count: int) -> list[int]:
        """Take `count` blocks for `seq_id`; the caller has checked that so many are free."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free"
        return [self.allocate_one(seq_id) for _ in range(count)]

    def allocate_one(self, seq_id: int) -> int:
        block = self._empty.pop() if self._empty else self._evict(seq_id)
        self._ref_counts[block] = 1
        self._record(ALLOCATE, block, seq_id, None)
        return block

    def publish(self, seq_id: int, block: int, parent: int, prefix_hash: int, tokens: bytes) -> int | None:
        """Offer a full block of `seq_id` for reuse and return the content number of its prefix.

        Where another block already holds the same prefix, that one stays in the index and its number is returned.
        None, and nothing published, when another content has the same parent and hash: the chain ends there.
        """
        key = (parent, prefix_hash)
        known = self._index.get(key)
        if known is not None:
            return self._contents[known] if self._tokens[known] == tokens else None
        self._last_content += 1
        self._index[key] = block
        self._hashes[block] = prefix_hash
        self._parents[block] = parent
        self._contents[block] = self._last_content
        self._tokens[block] = tokens
        self._record(COMMIT, block, seq_id, None)
        return self._last_content

    def free(self, seq_id: int, blocks: Items[int], reason: str) -> int:
        """Take `seq_id` off the users of its `blocks`; returns how many have no user left.

        From the last to the first, so that a prefix is evicted from its end and never loses its beginning first.
        """
        freed = 0
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} freed more often than it was taken"
            self._ref_counts[block] = count
            if count:
                self._record(RELEASE, block, seq_id, reason)
                continue
            if self._hashes[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None
            freed += 1
            self._record(FREE, block, seq_id, reason)
        return freed

    def check_integrity(self, tables: Items[Items[int]]) -> None:
        """Raise AssertionError, with the numbers, unless the blocks are conserved.

        `tables` are the block tables of all live sequences.
        """
        users = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block stands twice in one table: {table}"
            for block in table:
                users[block] += 1
        assert users == self._ref_counts, f"reference counts {self._ref_counts} but live tables give {users}"
        unused = self._empty + list(self._cached)
        assert len(unused) == len(set(unused)), "a block is free twice"
        assert sorted(unused) == [b for b in range(self.num_blocks) if not users[b]], "free + used is not the total"
        assert all(self._hashes[b] is None for b in self._empty), "an empty block still has a hash"
        published = {b for b in range(self.num_blocks) if self._hashes[b] is not None}
        assert set(self._index.values()) == published, "the index and the published blocks differ"
        assert set(self._cached) <= published, "a cached block is not in the index"

    def _evict(self, seq_id: int) -> int:
        block, _ = self._cached.popitem(last=False)
        prefix_hash = self._hashes[block]
        assert prefix_hash is not None
        del self._index[(self._parents[block], prefix_hash)]
        self.events.append(BlockEvent(EVICT, block, seq_id, None, 0, prefix_hash, self.num_free + 1))
        self._hashes[block] = None
        self._tokens[block] = b""
        return block

    def _record(self, event: str, block: int, seq_id: int, reason: str | None) -> None:
        free = len(self._empty) + len(self._cached)
        self.events.append(BlockEvent(event, block, seq_id, reason, self._ref_counts[block], self._hashes[block], free))
