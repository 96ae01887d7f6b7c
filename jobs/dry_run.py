"""dry_run=true: everything of a run that needs no model: each row read, rendered, tokenised and checked."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import xxhash

from jobs.config import GenerateConfig
from jobs.earlier_runs import EarlierRun, similar_run
from jobs.ready_rows import ReadyRow
from jobs.rows import BadRow
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.plan import Runner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.intake import Intake
from nanovllm.models.model_config import Qwen3Config, default_sampling, parse_config
from nanovllm.models.source import ModelSource
from nanovllm.text import load_tokenizer

SHOWN_FAILURES = 20
CPU_CACHE_BYTES = 512 * 2**20
"""Of a CPU's KV cache where kv.num_blocks is not set; see runner.kv_cache, which needs torch."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GPU = Path("/dev/nvidiactl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The KV cache that the run would have, as far as that is known without the device."""

    block_size: int
    block_bytes: int
    num_blocks: int | None
    """None: fills the memory of a GPU, and how much that is only the run itself finds out."""


@dataclass(slots=True)
class Survey:
    """What the rows of an input amount to. 24 bytes a row."""

    prompt_tokens: array = field(default_factory=lambda: array("i"))
    max_tokens: array = field(default_factory=lambda: array("i"))
    """Of the output; -1 where there is no limit but the model's."""
    ids: array = field(default_factory=lambda: array("Q"))
    columns: Counter[str] = field(default_factory=Counter)
    """Of writer.keep: how many rows that can be answered have each."""
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[BadRow] = field(default_factory=list)
    """The first ones."""

    def take(self, rows: Iterable[ReadyRow | BadRow]) -> None:
        for row in rows:
            if isinstance(row, BadRow):
                self.codes[str(row.code)] += 1
                if len(self.failures) < SHOWN_FAILURES:
                    self.failures.append(row)
                continue
            self.columns.update(name for name, value in row.columns.items() if value is not None)
            limit = row.request.sampling.max_tokens
            self.prompt_tokens.append(len(row.request.token_ids))
            self.max_tokens.append(-1 if limit is None else limit)
            self.ids.append(xxhash.xxh64_intdigest(f"{type(row.id).__name__} {row.id}".encode()))

    @property
    def num_failed(self) -> int:
        return self.codes.total()

    def num_repeated_ids(self) -> int:
        """Rows whose id an earlier row has."""
        return len(self.ids) - len(np.unique(np.asarray(self.ids)))


def is_on_cpu(config: GenerateConfig) -> bool:
    return config.device == "cpu" or (config.device == "auto" and not _GPU.exists())


def planned_cache(config: GenerateConfig, model: Qwen3Config) -> Cache:
    on_cpu = is_on_cpu(config)
    dtype = ("float32" if on_cpu else model.dtype) if config.model.dtype == "auto" else config.model.dtype
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * DTYPE_BYTES[dtype]
    block_bytes = per_token * config.kv.block_size
    num_blocks = config.kv.num_blocks
    if num_blocks is None and on_cpu:
        num_blocks = max(1, CPU_CACHE_BYTES // block_bytes)
    return Cache(block_size=config.kv.block_size, block_bytes=block_bytes, num_blocks=num_blocks)


def intake_without_model(config: GenerateConfig, source: ModelSource, cache: Cache) -> Intake:
    """Checks prompts as the run's own does. Of a cache of unknown size it takes every row that the model takes."""
    model = parse_config(source.config)
    max_model_len = config.engine.max_model_len or model.max_position_embeddings
    enough = -(-max_model_len // cache.block_size)
    scheduler = Scheduler(
        BlockManager(cache.num_blocks or enough, cache.block_size, prefix_caching=False),
        max_num_seqs=1,
        max_num_batched_tokens=1,
        max_model_len=max_model_len,
        eos_token_ids=(),
    )
    return Intake(
        LLMEngine(scheduler, cast(Runner, None)),  # nothing is ever added
        load_tokenizer(source.directory),
        vocab_size=model.vocab_size,
        defaults=default_sampling(source.generation_config),
        seed=config.seed,
    )


def report(config: GenerateConfig, source: ModelSource, survey: Survey, cache: Cache) -> str:
    """A few aligned lines for the terminal."""
    model = parse_config(source.config)
    max_model_len = config.engine.max_model_len or model.max_position_embeddings
    num_good = len(survey.prompt_tokens)
    lines = [
        ("dry run", "every row was checked; nothing was generated and no directory made"),
        ("model", f"{source.name}, {model.num_parameters:,} weights, {max_model_len:,} tokens at most"),
        ("rows", f"{num_good:,} can be answered, {survey.num_failed:,} cannot"),
    ]
    if survey.codes:
        lines.append(("failures", ", ".join(f"{code} {count:,}" for code, count in survey.codes.most_common())))
        lines += [("", _printable(f"{row.file}, line {row.line}: {row.code}: {row.reason}")) for row in survey.failures]
        if survey.num_failed > len(survey.failures):
            lines.append(("", f"and {survey.num_failed - len(survey.failures):,} more"))
    if repeated := survey.num_repeated_ids():
        lines.append(
            ("ids", f"{repeated:,} rows repeat an earlier row's id; that is legal, rows are told apart by row")
        )
    if config.writer.keep:
        kept = [f"{name} in {survey.columns[name]:,} of the rows" for name in config.writer.keep]
        lines.append(("kept", f"{', '.join(kept)}; null in the others"))
    if num_good:
        lines += _size_lines(config, survey, cache, max_model_len)
        earlier = similar_run(config, source.name, num_good, on_cpu=is_on_cpu(config))
        lines.append(("time", _time_line(survey, earlier, max_model_len)))
    return "\n".join(f"{name:14s} {value}" for name, value in lines)


def _printable(text: str) -> str:
    """Without what a terminal would obey: a reason may quote a template or a row."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _size_lines(config: GenerateConfig, survey: Survey, cache: Cache, max_model_len: int) -> list[tuple[str, str]]:
    prompts = np.asarray(survey.prompt_tokens)
    limits = _limits(survey, cache, max_model_len)
    blocks = -(-(limits - 1) // cache.block_size)
    at_once = min(config.engine.max_num_seqs, len(blocks))
    largest = int(np.partition(blocks, len(blocks) - at_once)[len(blocks) - at_once :].sum())
    if cache.num_blocks is None:
        has = "the cache will fill the GPU's memory"
    else:
        has = f"the cache has {cache.num_blocks:,}"
        has += "" if largest <= cache.num_blocks else ", so fewer may run at once, or some be preempted"
    unlimited = int((np.asarray(survey.max_tokens) < 0).sum())
    output = f"{int((limits - prompts).sum()):,} tokens at most"
    if unlimited:
        output += f"; {unlimited:,} rows have no max_tokens and may go up to the model's length"
    median = int(np.median(prompts))
    return [
        (
            "prompts",
            f"{int(prompts.sum()):,} tokens; shortest {prompts.min():,}, median {median:,}, longest {prompts.max():,}",
        ),
        ("output", output),
        ("KV cache", f"blocks of {cache.block_size} tokens and {cache.block_bytes:,} bytes"),
        ("", f"the longest row needs up to {int(blocks.max()):,}"),
        ("", f"{at_once:,} rows at once need up to {largest:,} ({largest * cache.block_bytes / 1e9:.2f} GB); {has}"),
    ]


def _limits(survey: Survey, cache: Cache, max_model_len: int) -> np.ndarray:
    """int64: the most tokens, prompt included, of each row."""
    prompts, outputs = np.asarray(survey.prompt_tokens, np.int64), np.asarray(survey.max_tokens, np.int64)
    most = max_model_len
    if cache.num_blocks is not None:
        most = min(most, cache.num_blocks * cache.block_size + 1)
    return np.where(outputs < 0, most, np.minimum(max_model_len, prompts + outputs))


def _time_line(survey: Survey, earlier: EarlierRun | None, max_model_len: int) -> str:
    if earlier is None:
        return (
            "unknown: no complete run under outputs/ has this model, dtype, kv, engine and device and about as many "
            "rows at once"
        )
    outputs = np.asarray(survey.max_tokens, np.float64)
    expected = np.where(outputs < 0, earlier.output_tokens_per_row, np.minimum(outputs, earlier.output_tokens_per_row))
    prompts = np.asarray(survey.prompt_tokens, np.float64)
    num_tokens = prompts.sum() + np.minimum(expected, max_model_len - prompts).sum()
    seconds = earlier.seconds * num_tokens / earlier.num_tokens
    shown = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return (
        f"about {shown} of steps, if answers are as long and steps as fast as in {earlier.directory} "
        f"({earlier.num_rows:,} rows, {earlier.num_output_tokens:,} output tokens, "
        f"{earlier.output_tokens_per_row:.0f} a row, {earlier.device})"
    )
