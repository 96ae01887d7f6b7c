"""What the workload benchmark is told: the only home of its defaults, validated when it is built."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from jobs.config import LOG_LEVELS
from jobs.workloads import WORKLOADS, WorkloadKind, check_workloads
from nanovllm.config import DEVICES, EngineConfig, KVConfig, ModelConfig, ParallelConfig, check_choice, check_integer

RECORDER = ("on", "off", "both")
PEERS = ("nano-vllm", "mini-sglang", "vllm")
INSTALLED_PEERS = ("vllm",)
"""Those that need no `path`: without one, `bench.python` has them among its packages."""
NOT_SCALED = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchEngineConfig:
    """The engine's settings; null takes the workload's own value and, where it has none, the engine's default."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    """null: the workload's longest sequence, rounded up."""
    enforce_eager: bool | None = None
    kernels: str | None = None
    attention: str | None = None

    def over(self, kind: WorkloadKind) -> EngineConfig:
        """For one workload, its length left open."""
        own = {"max_num_seqs": kind.max_num_seqs, "max_num_batched_tokens": kind.max_num_batched_tokens}
        return EngineConfig(**{**own, **{key: value for key, value in asdict(self).items() if value is not None}})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    """What is measured, and how often."""

    rounds: int = 3
    """Timed ones; with recorder=both, as many with it as without."""
    warmup: int = 1
    """Rounds of the same kind before these, whose time does not count."""
    seed: int = 1
    """Of the first round; every further one takes the next, so that no prefix cache answers from an earlier one."""
    scale: float = NOT_SCALED
    """Factor on the workload's lengths and on its number of sequences, to try the benchmark on a CPU."""
    temperature: float = 0.6
    recorder: str = "both"
    """The flight recorder: on, off, or both in turn on the same engine, with prompts of the same lengths."""
    peer: str | None = None
    """Runs another engine's checkout instead of ours, in a process of its own."""
    python: str | None = None
    """The peer's Python interpreter; null: this one."""

    def __post_init__(self) -> None:
        check_integer("bench.rounds", self.rounds, 1)
        check_integer("bench.warmup", self.warmup, 0)
        check_integer("bench.seed", self.seed, 0, 2**31 - 1)
        if not 0 < self.scale <= 1:
            raise ValueError(f"bench.scale={self.scale}: must be above 0 and at most 1")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"bench.temperature={self.temperature}: must be a number from 0 to 100")
        check_choice("bench.recorder", self.recorder, RECORDER)
        if self.peer is not None:
            check_choice("bench.peer", self.peer, PEERS)
        elif self.python is not None:
            raise ValueError(f"bench.python={self.python}: is for bench.peer=NAME alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """One run of `python -m jobs.bench workload=...`."""

    workload: list[str] = field(default_factory=lambda: ["nano"])
    """In this order; on the command line, names with commas between."""
    path: str | None = None
    """The peer's checkout."""
    log_level: str | None = "WARNING"
    """null takes NANOVLLM_LOG_LEVEL, else INFO."""
    device: str = "auto"
    """auto takes the first CUDA device and, without one, the CPU."""
    bench: RoundsConfig = field(default_factory=RoundsConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(load_format="dummy"))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    engine: BenchEngineConfig = field(default_factory=BenchEngineConfig)

    def __post_init__(self) -> None:
        check_workloads("workload", self.workload)
        check_choice("device", self.device, DEVICES)
        if self.log_level is not None and self.log_level.upper() not in LOG_LEVELS:
            raise ValueError(f"log_level={self.log_level}: must be one of {', '.join(LOG_LEVELS)}")
        for name in self.workload:
            self.engine.over(WORKLOADS[name])
        if self.bench.peer is None:
            if self.path is not None:
                raise ValueError(f"path={self.path}: is the checkout of bench.peer=NAME, one of {', '.join(PEERS)}")
        else:
            self._check_peer(self.bench.peer)

    @property
    def reads_standard_input(self) -> bool:
        return False

    def _check_peer(self, peer: str) -> None:
        if self.path is None and peer not in INSTALLED_PEERS:
            raise ValueError(f"bench.peer={peer}: needs path=DIR, its checkout")
        if self.path is not None and not Path(self.path).is_dir():
            raise ValueError(f"path={self.path}: must be a directory, the checkout of {peer}")
        if peer == "nano-vllm" and self.bench.temperature == 0:
            raise ValueError(f"bench.temperature={self.bench.temperature}: must be above 0 for bench.peer={peer}")
        ours = (self.engine.kernels, self.engine.attention)
        if self.kv != KVConfig() or ours != (None, None) or self.device != "auto":
            raise ValueError(
                f"bench.peer={peer}: kv.*, engine.kernels, engine.attention and device are settings of our own engine "
                "and have no effect on a peer; leave them out"
            )
