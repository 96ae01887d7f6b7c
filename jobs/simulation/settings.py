"""What a simulation may change: the limits of the scheduler and the KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nanovllm.config import EngineConfig, KVConfig

KEYS = (
    "kv.block_size",
    "kv.num_blocks",
    "kv.prefix_caching",
    "engine.max_num_seqs",
    "engine.max_num_batched_tokens",
    "engine.max_model_len",
)
"""In the words of a job's configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that scheduler and block manager are built from. ValueError names what cannot be."""

    block_size: int
    num_blocks: int
    prefix_caching: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    def __post_init__(self) -> None:
        KVConfig(block_size=self.block_size, num_blocks=self.num_blocks, prefix_caching=self.prefix_caching)
        EngineConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
        )

    def changed(self, values: Mapping[str, object]) -> "Settings":
        """With some of KEYS set; null leaves a value as it is, but kv.num_blocks=null keeps the cache's bytes."""
        given = {key.partition(".")[2]: value for key, value in values.items() if value is not None}
        if "num_blocks" not in given and "block_size" in given:
            KVConfig(block_size=given["block_size"])  # pyright: ignore[reportArgumentType]
            given["num_blocks"] = max(1, self.block_size * self.num_blocks // int(str(given["block_size"])))
        return replace(self, **given)  # pyright: ignore[reportArgumentType]
