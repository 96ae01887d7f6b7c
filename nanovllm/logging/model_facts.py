"""What the text log knows of the model besides the events."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes that do not change during a run. Head counts are the whole model's; a rank holds its share of them."""

    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    kv_cache_shape: tuple[int, ...]
    """Of one layer's keys, and likewise of its values, as they are laid out on this rank."""
    block_size: int
    rank: int = 0
    tensor_parallel_size: int = 1

    @property
    def query_heads_per_rank(self) -> int:
        return self.num_attention_heads // self.tensor_parallel_size

    @property
    def kv_heads_per_rank(self) -> int:
        """At least one: with more ranks than heads, several ranks hold the same head."""
        return max(1, self.num_kv_heads // self.tensor_parallel_size)
