"""Which shapes the steps of an engine are padded to, by its limits alone. Pure Python: a simulator asks too."""

from collections.abc import Iterator
from dataclasses import dataclass

MIN_HALVES_ROWS, MAX_HALVES_ROWS = 8, 160
MIN_HALVES_TOKENS = 65536
"""Whose keys and values take so long to read that the other half's matrix products fit into that time; kernels/NOTES.md
has what was measured."""
NEVER = 2**62
"""More tokens than there can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """The sizes that steps are padded to, ascending."""

    decodes: list[int]
    """Rows of decode steps."""
    tokens: list[int]
    """Tokens of steps with prefills; empty where those run at their own size."""
    sampled: list[int]
    """Rows of logits of steps with prefills."""
    in_halves: list[int]
    """Those of `decodes` at which a step can run in halves."""

    @property
    def most_decode_graphs(self) -> int:
        """How many shapes decode steps can have: whole and in halves, rows cut or not; or with shared prefixes."""
        return 3 * len(self.decodes) + 2 * len(self.in_halves)

    @property
    def with_prefills(self) -> list[tuple[int, int]]:
        """(tokens, rows of logits) that steps with prefills can have, descending."""
        shapes = [(count, size) for count in self.tokens for size in self.sampled]
        return [shape for shape in reversed(shapes) if shape[1] <= next_size(self.sampled, shape[0])]

    def most_graphs(self) -> int:
        """How many shapes steps can have."""
        return self.most_decode_graphs + len(self.with_prefills)

    def largest(self) -> "GraphSizes":
        """The last of each: whose memory the others share."""
        return GraphSizes(
            decodes=sorted({self.decodes[-1], *self.in_halves[-1:]}),
            tokens=self.tokens[-1:],
            sampled=self.sampled[-1:],
            in_halves=self.in_halves[-1:],
        )

    def runs_in_halves(self, rows: int, context_tokens: int) -> bool:
        """Whether a decode step of `rows` that share no prefix, `context_tokens` in all, is faster in halves."""
        return context_tokens >= self.halves_from(rows)

    def halves_from(self, rows: int) -> int:
        """The tokens of context from which that is so; NEVER for too few rows or too many."""
        fits = rows >= MIN_HALVES_ROWS and next_size(self.decodes, rows) in self.in_halves
        return MIN_HALVES_TOKENS if fits else NEVER


def graph_sizes(
    max_num_seqs: int, max_num_batched_tokens: int, *, with_prefills: bool, with_halves: bool
) -> GraphSizes:
    """Sizes that hold every step, with little padding where padding costs.

    Decode steps are dense up to 256, where a matrix product takes the same time whatever its rows; beyond, sizes are an
    eighth apart. Steps with prefills mostly fill max_num_batched_tokens, and up to 128 rows of logits cost the same.
    """
    decodes = {1, 2, 4, 8, 16, 24, *range(32, 256, 32), *_growing(256, max_num_seqs, 64)}
    tokens = {64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, *_growing(4096, max_num_batched_tokens, 1024)}
    sampled = {128 << i for i in range(8)}

    def up_to(sizes: set[int], most: int) -> list[int]:
        return [*sorted(size for size in sizes if size < most), most]

    decode_sizes = up_to(decodes, max_num_seqs)
    halved = [size for size in decode_sizes if MIN_HALVES_ROWS <= size <= MAX_HALVES_ROWS and size % 2 == 0]
    return GraphSizes(
        decodes=decode_sizes,
        in_halves=halved if with_halves else [],
        tokens=up_to(tokens, max_num_batched_tokens) if with_prefills else [],
        sampled=up_to(sampled, max_num_seqs),
    )


def _growing(first: int, most: int, step: int) -> Iterator[int]:
    """From `first` to below `most`, by the most multiples of `step` that are an eighth at most, or by one."""
    size = first
    while size < most:
        yield size
        size += max(size // (8 * step), 1) * step


def next_size(sizes: list[int], count: int) -> int:
    """The least of the ascending `sizes` that holds `count`; the last one where none does."""
    return next((size for size in sizes if size >= count), sizes[-1])
