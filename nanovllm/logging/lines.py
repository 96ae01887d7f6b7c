"""The log's five loggers, and the lines that are written while an LLM is being built."""

import logging
from collections.abc import Callable, Mapping

from nanovllm.logging.memory import GIGABYTE

ENGINE = logging.getLogger("nanovllm.engine.llm_engine")
SCHEDULER = logging.getLogger("nanovllm.engine.scheduler")
BLOCKS = logging.getLogger("nanovllm.engine.block_manager")
RUNNER = logging.getLogger("nanovllm.engine.model_runner")
ATTENTION = logging.getLogger("nanovllm.layers.attention")

THICK_RULE = "=" * 80
THIN_RULE = "-" * 80


def log_engine_start(model: str, settings: Mapping[str, object]) -> None:
    """An LLM is about to be built; `settings` are all engine settings, in the order in which they are to be shown."""
    if not ENGINE.isEnabledFor(logging.INFO):
        return
    ENGINE.info(THICK_RULE)
    ENGINE.info("Initializing LLMEngine")
    ENGINE.info("Model: %s", model)
    ENGINE.info("Configuration: %s", _key_values(settings))


def log_runner_start(rank: int = 0) -> None:
    RUNNER.info("Initializing ModelRunner (rank %d)", rank)


def log_reference_on_gpu(obstacle: str) -> None:
    """The plain torch definitions run on a GPU, and nobody asked for them."""
    RUNNER.warning("Without Triton's kernels this GPU runs the reference, many times slower: %s", obstacle)


def log_model_loading(path: str) -> None:
    """Weights are about to be read."""
    RUNNER.info("Loading model: %s", path)


def log_model_config(config: Mapping[str, object]) -> None:
    """The architecture's sizes, in the order in which they are to be shown: num_layers, hidden_size, ..."""
    if RUNNER.isEnabledFor(logging.INFO):
        RUNNER.info("Model config: %s", _key_values(config))


def log_model_loaded(memory: Callable[[], str]) -> None:
    log_memory(RUNNER, "After model loading", memory)


def log_kv_cache(*, num_kv_heads: int, head_dim: int, block_size: int, num_blocks: int, total_bytes: int) -> None:
    """The cache is about to be allocated; `total_bytes` counts keys and values of all layers on this device."""
    if not RUNNER.isEnabledFor(logging.INFO):
        return
    RUNNER.info("Allocating KV cache")
    RUNNER.info(
        "KV cache configuration: num_kv_heads=%d, head_dim=%d, block_size=%d", num_kv_heads, head_dim, block_size
    )
    RUNNER.info("Allocating %d KV cache blocks, total_size=%.2fGB", num_blocks, total_bytes / GIGABYTE)
    RUNNER.info("KV cache capacity: %d tokens", num_blocks * block_size)


def log_kv_cache_allocated(memory: Callable[[], str]) -> None:
    log_memory(RUNNER, "After KV cache allocation", memory)


def log_capture(*, num_graphs: int, seconds: float, num_bytes: int) -> None:
    """CUDA graphs are ready; `num_bytes` counts the runner's other buffers too."""
    RUNNER.info(
        "Captured %d CUDA graphs in %.2fs, total_size=%.2fGB",
        num_graphs,
        seconds,
        num_bytes / GIGABYTE,
    )


def log_memory(logger: logging.Logger, moment: str, memory: Callable[[], str]) -> None:
    """One memory line; `memory` gives its text and is called only if the line is shown."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s - %s", moment, memory())


def _key_values(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
