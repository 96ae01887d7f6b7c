"""Engine settings: frozen, validated when they are built, and the only home of engine defaults."""

from dataclasses import dataclass, field

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("safetensors", "dummy")
DEVICES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "triton", "reference")
ATTENTION = ("auto", "triton", "flash_attn", "reference")


def check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError that names key, value and the allowed words."""
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")


def check_integer(key: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raises ValueError unless `value` is an int (not a bool) within [minimum, maximum]."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else minimum - 1
    if number >= minimum and (maximum is None or number <= maximum):
        return
    allowed = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    raise ValueError(f"{key}={value!r}: must be {allowed}")


def check_boolean(key: str, value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: must be true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Where the weights come from."""

    path: str = "???"
    """A local directory, a hub id such as Qwen/Qwen3-0.6B, or `tiny` (ships with the project)."""
    dtype: str = "auto"
    """auto: the checkpoint's own dtype on a GPU, float32 on a CPU."""
    load_format: str = "safetensors"
    """safetensors, or dummy: random weights in the shape of the model's config.json, for benchmarks."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes the default branch."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path.strip():
            raise ValueError(f"model.path={self.path!r}: must be a directory, a hub id (owner/name) or tiny")
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.load_format", self.load_format, LOAD_FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices."""

    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise ValueError(f"parallel.tensor_parallel_size={self.tensor_parallel_size}: must be 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVConfig:
    """The paged KV cache."""

    block_size: int = 16
    """Tokens in a KV block."""
    num_blocks: int | None = None
    """Blocks of the cache; null fills `memory_fraction` of the device (GPU) or 512 MiB (CPU)."""
    memory_fraction: float = 0.9
    """Share of the GPU memory free after loading that the cache may take."""
    prefix_caching: bool = True
    """Reuse the KV of full blocks whose whole prefix is the same."""

    def __post_init__(self) -> None:
        check_integer("kv.block_size", self.block_size, 1, 4096)
        if self.num_blocks is not None:
            check_integer("kv.num_blocks", self.num_blocks, 1)
        check_boolean("kv.prefix_caching", self.prefix_caching)
        fraction = self.memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"kv.memory_fraction={self.memory_fraction}: must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Batching limits."""

    max_num_seqs: int = 256
    """Sequences that run at the same time."""
    max_num_batched_tokens: int = 8192
    """Tokens in one step, prefill and decode together."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; null takes the model's own limit."""
    enforce_eager: bool = False
    """Never use CUDA graphs."""
    kernels: str = "auto"
    """Implementation of the model's operations, attention apart; what auto chose, and why, is in the log."""
    attention: str = "auto"
    """Implementation of attention: auto, triton, flash_attn or reference."""

    def __post_init__(self) -> None:
        check_integer("engine.max_num_seqs", self.max_num_seqs, 1, 65536)
        check_integer("engine.max_num_batched_tokens", self.max_num_batched_tokens, 1)
        if self.max_model_len is not None:
            check_integer("engine.max_model_len", self.max_model_len, 2)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: must be at least "
                f"engine.max_num_seqs={self.max_num_seqs}, so that every running sequence can decode in one step"
            )
        check_boolean("engine.enforce_eager", self.enforce_eager)
        check_choice("engine.kernels", self.kernels, KERNELS)
        check_choice("engine.attention", self.attention, ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """Everything that an LLM is built from."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    device: str = "auto"
    """auto takes the first CUDA device and, without one, the CPU."""
    seed: int = 0
    """Seed of every row that has none of its own."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_integer("seed", self.seed, 0, 2**63 - 1)
