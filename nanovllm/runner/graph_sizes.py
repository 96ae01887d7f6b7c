"""Which shapes the steps of an engine are padded to, by its limits alone. Pure Python: a simulator asks too."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """The sizes that steps are padded to, ascending."""

    decodes: list[int]
    """Rows of decode steps."""
    tokens: list[int]
    """Tokens of steps with prefills; empty where those run at their own size."""
    sampled: list[int]
    """Rows of logits of steps with prefills."""

    def most_graphs(self) -> int:
        """How many shapes steps can have."""
        with_prefills = sum(size <= next_size(self.sampled, count) for count in self.tokens for size in self.sampled)
        return 2 * len(self.decodes) + with_prefills

    def largest(self) -> "GraphSizes":
        """The last of each: whose memory the others share."""
        return GraphSizes(decodes=self.decodes[-1:], tokens=self.tokens[-1:], sampled=self.sampled[-1:])


def graph_sizes(max_num_seqs: int, max_num_batched_tokens: int, *, with_prefills: bool) -> GraphSizes:
    """Sizes that hold every step, with little padding where padding costs.

    Decode steps are dense up to 256, where a matrix product takes the same time whatever its rows, and beyond every
    64th. Steps with prefills mostly fill max_num_batched_tokens.
    """
    decodes = {1, 2, 4, 8, 16, 24, *range(32, 256, 32), *range(256, max_num_seqs, 64)}
    tokens = {64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, *range(4096, max_num_batched_tokens, 1024)}
    sampled = {16 << i for i in range(12)}

    def up_to(sizes: set[int], most: int) -> list[int]:
        return [*sorted(size for size in sizes if size < most), most]

    return GraphSizes(
        decodes=up_to(decodes, max_num_seqs),
        tokens=up_to(tokens, max_num_batched_tokens) if with_prefills else [],
        sampled=up_to(sampled, max_num_seqs),
    )


def next_size(sizes: list[int], count: int) -> int:
    """The least of the ascending `sizes` that holds `count`; the last one where none does."""
    return next((size for size in sizes if size >= count), sizes[-1])
