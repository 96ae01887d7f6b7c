"""What a generate job is told: the only home of the job's defaults, validated when it is built."""

import math
from dataclasses import dataclass, field
from typing import Any

from jobs.batch_output import FORMAT as OPENAI_BATCH
from jobs.chat_forms import check_template_kwargs
from jobs.disk import DURABILITIES
from nanovllm.config import (
    DEVICES,
    EngineConfig,
    KVConfig,
    LLMConfig,
    ModelConfig,
    ParallelConfig,
    check_choice,
    check_integer,
)
from nanovllm.sampling_params import SamplingParams

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
OUTPUT_FORMATS = ("jsonl", "parquet", OPENAI_BATCH)
PROGRESS = ("auto", "on", "off")
STANDARD_INPUT = "-"
FREE_KEYS = (
    "resume",
    "log_level",
    "progress",
    "watchdog_s",
    "device",
    "parallel",
    "kv",
    "engine.max_num_seqs",
    "engine.max_num_batched_tokens",
    "engine.enforce_eager",
    "engine.kernels",
    "engine.attention",
    "reader.max_failures",
    "writer.durability",
    "recorder",
)
"""Keys and groups that a resumed run may change: what they change of a row's answer is at most the rounding, as another
batch would. Every other key decides answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig:
    """How input rows become prompts."""

    limit: int | None = None
    """Read this many rows; null reads all."""
    prompt: str | None = None
    """A column's name, or a template such as "Translate: {text}"; null takes the row's own prompt."""
    system: str | None = None
    """A system message put before each row's messages."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false}; a row's own win, key by key."""
    max_failures: int | None = None
    """End the run as failed when more rows than this are bad; null never does."""

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_integer("reader.limit", self.limit, 1)
        if self.max_failures is not None:
            check_integer("reader.max_failures", self.max_failures, 0)
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"reader.prompt={self.prompt!r}: must be a column's name or a template with {{column}}")
        check_template_kwargs(f"reader.chat_template_kwargs={self.chat_template_kwargs}:", self.chat_template_kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterConfig:
    """How answers are written."""

    format: str = "jsonl"
    """jsonl, parquet, or openai_batch: OpenAI Batch lines, for input of that form alone."""
    keep: list[str] = field(default_factory=list)
    """Input columns that are carried into the output."""
    durability: str = "power"
    """What an acknowledged row survives: a loss of power, or the death of the process alone."""

    def __post_init__(self) -> None:
        check_choice("writer.format", self.format, OUTPUT_FORMATS)
        check_choice("writer.durability", self.durability, DURABILITIES)
        if not all(column.strip() for column in self.keep):
            raise ValueError(f"writer.keep={self.keep}: must be a list of column names, none of them empty")
        if len(set(self.keep)) < len(self.keep):
            raise ValueError(f"writer.keep={self.keep}: must name each column once")
        if self.keep and self.format == OPENAI_BATCH:
            raise ValueError(f"writer.keep={self.keep}: writer.format={OPENAI_BATCH} has no place for columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderConfig:
    """The Parquet records of a run: every step, every block event, every request."""

    enabled: bool = True
    flush_s: float = 5.0
    """Longest time in seconds that a recorded event or a finished row may wait before it is on disk."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.flush_s) and self.flush_s > 0):
            raise ValueError(f"recorder.flush_s={self.flush_s}: must be a number of seconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """One run of `python -m jobs.generate`."""

    input: str | None = None
    """JSONL or Parquet file, a glob, or - for JSONL on standard input; null takes the bundled prompts."""
    log_level: str | None = None
    """DEBUG, INFO, WARNING or ERROR; null takes NANOVLLM_LOG_LEVEL, else INFO."""
    progress: str = "auto"
    """The progress bar: auto shows it on a terminal."""
    resume: str | None = None
    """The directory of a run to go on with; its own configuration applies, and the further keys on top of it."""
    dry_run: bool = False
    """Check every row and say what the run would need, without running it."""
    watchdog_s: float | None = None
    """Seconds without progress after which a run is ended as failed; 0 never; null: 300 on a GPU, 3,600 on a CPU."""
    seed: int = 0
    """Seed of every row that has none of its own."""
    device: str = "auto"
    """auto takes the first CUDA device and, without one, the CPU."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    writer: WriterConfig = field(default_factory=WriterConfig)
    recorder: RecorderConfig = field(default_factory=RecorderConfig)

    def __post_init__(self) -> None:
        if self.input is not None and not self.input.strip():
            raise ValueError(f"input={self.input!r}: must be a file, a glob, - (standard input) or null")
        if self.log_level is not None and self.log_level.upper() not in LOG_LEVELS:
            raise ValueError(f"log_level={self.log_level}: must be one of {', '.join(LOG_LEVELS)}")
        check_choice("progress", self.progress, PROGRESS)
        if self.watchdog_s is not None and not (math.isfinite(self.watchdog_s) and self.watchdog_s >= 0):
            raise ValueError(f"watchdog_s={self.watchdog_s}: must be a number of seconds of at least 0, or null")
        check_integer("seed", self.seed, 0, 2**63 - 1)
        if self.writer.format == OPENAI_BATCH and self.reader.prompt is not None:
            raise ValueError(
                f"writer.format={OPENAI_BATCH}: answers OpenAI Batch lines, which have no reader.prompt; leave one out"
            )
        check_choice("device", self.device, DEVICES)

    @property
    def reads_standard_input(self) -> bool:
        return self.input == STANDARD_INPUT


def to_llm_config(config: GenerateConfig) -> LLMConfig:
    """The part of the job's configuration that the engine is built from."""
    return LLMConfig(
        model=config.model,
        parallel=config.parallel,
        kv=config.kv,
        engine=config.engine,
        device=config.device,
        seed=config.seed,
    )
