"""Builds a working engine from a configuration: model, KV cache, runner, scheduler, recorders."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from nanovllm.config import LLMConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import SettingError
from nanovllm.events import Recorder
from nanovllm.intake import Intake
from nanovllm.kernel_choice import KernelChoice, choose_kernels
from nanovllm.logging import lines
from nanovllm.logging.memory import cpu_memory, gpu_memory
from nanovllm.logging.text_recorder import ModelFacts, TextRecorder
from nanovllm.models.model_config import Qwen3Config, default_sampling, eos_token_ids, parse_config
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.source import ModelSource, resolve_model
from nanovllm.models.weights import load_dummy, load_weights
from nanovllm.runner.graph_sizes import GraphSizes, graph_sizes
from nanovllm.runner.kv_cache import allocate, block_bytes, choose_num_blocks
from nanovllm.runner.model_runner import ModelRunner, row_multiple
from nanovllm.runner.profiling import available_kv_bytes
from nanovllm.text import load_tokenizer

Phase = Callable[[str], AbstractContextManager[object]]
"""Wraps a named part of the work, to time it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A working engine and what it was built from, with every automatic choice made."""

    engine: LLMEngine
    intake: Intake
    source: ModelSource
    model_config: Qwen3Config
    settings: dict[str, object]
    """What the log's Configuration line shows."""
    num_kv_blocks: int
    kv_bytes: int
    device: str
    """The device's own name."""

    def facts(self) -> dict[str, object]:
        """The settings with every automatic choice made, and the model's shape, for a manifest."""
        return {
            **self.settings,
            "num_kv_blocks": self.num_kv_blocks,
            "kv_bytes": self.kv_bytes,
            "architecture": _architecture(self.model_config),
            "cuda": torch.version.cuda,
        }


def assemble(
    config: LLMConfig,
    *,
    recorders: Sequence[Recorder] = (),
    clock: Callable[[], int] = time.monotonic_ns,
    source: ModelSource | None = None,
    phase: Phase = lambda name: nullcontext(),
    first_step: int = 0,
    first_seq_id: int = 0,
) -> Assembly:
    """Load the model and build the engine around it; `source` saves a second look-up of model.path.

    `first_step` and `first_seq_id` are where the engine's numbers begin.

    Raises ModelError for a model that cannot be used, SettingError for settings that do not fit model or machine.
    """
    if source is None:
        source = resolve_model(config.model.path, config.model.revision, config.model.load_format)
    device = _choose_device(config.device)
    memory = gpu_memory if device.type == "cuda" else cpu_memory
    with phase("load"):
        c = parse_config(source.config)
        dtype = _choose_dtype(config.model.dtype, c, device)
        max_model_len = _choose_max_model_len(config, c)
        choice = choose_kernels(config.engine, c, dtype, config.kv.block_size, device)
        halves = _suits_halves(choice, c, dtype, device)
        sizes = _choose_graph_sizes(config, choice, device, halves=halves)
        settings = _settings(config, device, dtype, max_model_len, choice, sizes, halves=halves)
        lines.log_engine_start(source.name, settings)
        lines.log_runner_start()
        if choice.obstacle is not None:
            lines.log_reference_on_gpu(choice.obstacle)
        lines.log_model_loading(source.name)
        lines.log_model_config(_architecture(c))
        tokenizer = load_tokenizer(source.directory)
        model = _load_model(config, choice, source, c, dtype, device, max_model_len)
        lines.log_model_loaded(memory)

        def make_runner(kv_cache: torch.Tensor, sizes: GraphSizes | None) -> ModelRunner:
            return _make_runner(model, kv_cache, sizes, config, choice, c, dtype, max_model_len)

        bytes_per_block = block_bytes(c, config.kv.block_size, dtype)
        available = available_kv_bytes(make_runner, sizes, c, config, dtype, device, max_model_len)
        num_blocks = choose_num_blocks(config.kv, bytes_per_block, available, device.type == "cuda")
        lines.log_kv_cache(
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            block_size=config.kv.block_size,
            num_blocks=num_blocks,
            total_bytes=num_blocks * bytes_per_block,
        )
        kv_cache = allocate(c, num_blocks, config.kv.block_size, dtype, device)
        lines.log_kv_cache_allocated(memory)
    with phase("capture") if sizes is not None else nullcontext():
        runner = _capture(make_runner, kv_cache, sizes)
    facts = ModelFacts(
        num_attention_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        kv_cache_shape=tuple(kv_cache.shape[2:]),
        block_size=config.kv.block_size,
    )
    scheduler = Scheduler(
        BlockManager(num_blocks, config.kv.block_size, prefix_caching=config.kv.prefix_caching),
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids(
            source.config, source.generation_config, tokenizer.eos_token_id if tokenizer else None
        ),
    )
    engine = LLMEngine(
        scheduler,
        runner,
        recorders=[TextRecorder(facts, memory), *recorders],
        clock=clock,
        first_step=first_step,
        first_seq_id=first_seq_id,
    )
    intake = Intake(
        engine,
        tokenizer,
        vocab_size=c.vocab_size,
        defaults=default_sampling(source.generation_config),
        seed=config.seed,
    )
    return Assembly(
        engine=engine,
        intake=intake,
        source=source,
        model_config=c,
        settings=settings,
        num_kv_blocks=num_blocks,
        kv_bytes=num_blocks * bytes_per_block,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )


def _choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("device=cuda: torch sees no CUDA device; install a CUDA build of torch or use device=cpu")
    return torch.device("cuda", 0) if device != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _choose_dtype(dtype: str, c: Qwen3Config, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's on a GPU; float32 on a CPU, where it is both faster and exact."""
    if dtype == "auto":
        dtype = c.dtype if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choose_max_model_len(config: LLMConfig, c: Qwen3Config) -> int:
    asked = config.engine.max_model_len
    if asked is not None and asked > c.max_position_embeddings:
        raise SettingError(
            f"engine.max_model_len={asked}: must be at most {c.max_position_embeddings}, "
            "the model's max_position_embeddings"
        )
    return asked or c.max_position_embeddings


def _load_model(
    config: LLMConfig,
    choice: KernelChoice,
    source: ModelSource,
    c: Qwen3Config,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> Qwen3ForCausalLM:
    with torch.device(device), _default_dtype(dtype):
        model = Qwen3ForCausalLM(choice.ops(), choice.backend(), c, max_model_len)
    if config.model.load_format == "dummy":
        load_dummy(model, config.seed, dtype, device)
    else:
        load_weights(model, source, dtype, device)
    return model.eval()


def _choose_graph_sizes(
    config: LLMConfig, choice: KernelChoice, device: torch.device, *, halves: bool
) -> GraphSizes | None:
    if config.engine.enforce_eager or device.type != "cuda" or not choice.capturable:
        return None
    engine = config.engine
    with_prefills = choice.attention == "triton"  # whose grids do not depend on the rows
    limits = engine.max_num_seqs, engine.max_num_batched_tokens
    return graph_sizes(*limits, with_prefills=with_prefills, with_halves=halves)


def _suits_halves(choice: KernelChoice, c: Qwen3Config, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether half a step's attention and another half's products fit on one multiprocessor, all of them ours.

    If so, decode steps of CUDA graphs with enough rows and context run in halves, which max_num_seqs may rule out.
    """
    if device.type != "cuda" or not choice.kernels == choice.attention == "triton":
        return False
    from kernels.tiled_linear import weight_suits

    heads, intermediate = c.num_attention_heads * c.head_dim, c.intermediate_size
    qkv = heads + 2 * c.num_key_value_heads * c.head_dim
    weights = (
        (qkv, c.hidden_size),
        (c.hidden_size, heads),
        (2 * intermediate, c.hidden_size),
        (c.hidden_size, intermediate),
    )
    is_measured = torch.cuda.get_device_capability(device) >= (9, 0)  # older ones have less shared memory
    return is_measured and c.head_dim <= 128 and all(weight_suits(*shape, dtype) for shape in weights)


def _make_runner(
    model: Qwen3ForCausalLM,
    kv_cache: torch.Tensor,
    sizes: GraphSizes | None,
    config: LLMConfig,
    choice: KernelChoice,
    c: Qwen3Config,
    dtype: torch.dtype,
    max_model_len: int,
) -> ModelRunner:
    work = None
    if choice.attention == "triton":
        from nanovllm.runner.attention_work import AttentionWork

        work = AttentionWork(
            c,
            dtype,
            kv_cache.device,
            block_size=config.kv.block_size,
            max_num_seqs=config.engine.max_num_seqs,
            finds_prefixes=config.kv.prefix_caching,
        )
    return ModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.engine.max_num_seqs,
        max_model_len=max_model_len,
        work=work,
        graph_sizes=sizes,
    )


def _capture(
    make_runner: Callable[[torch.Tensor, GraphSizes | None], ModelRunner],
    kv_cache: torch.Tensor,
    sizes: GraphSizes | None,
) -> ModelRunner:
    """The engine's runner; says what its CUDA graphs took."""
    if sizes is None:
        return make_runner(kv_cache, None)
    torch.cuda.synchronize(kv_cache.device)
    free, began = torch.cuda.mem_get_info(kv_cache.device)[0], time.perf_counter()
    runner = make_runner(kv_cache, sizes)
    torch.cuda.synchronize(kv_cache.device)
    assert runner.graphs is not None
    lines.log_capture(
        num_graphs=runner.graphs.num_graphs,
        seconds=time.perf_counter() - began,
        num_bytes=free - torch.cuda.mem_get_info(kv_cache.device)[0],
    )
    return runner


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _settings(
    config: LLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    choice: KernelChoice,
    sizes: GraphSizes | None,
    *,
    halves: bool,
) -> dict[str, object]:
    return {
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_num_seqs": config.engine.max_num_seqs,
        "max_num_batched_tokens": config.engine.max_num_batched_tokens,
        "enforce_eager": config.engine.enforce_eager,
        "kernels": f"{choice.kernels} ({choice.kernels_reason})",
        "attention": f"{choice.attention} ({choice.attention_reason})",
        "cuda_graphs": _graphs_setting(config, device, sizes),
        "halves": halves,
        "hopper_kernels": _has_hopper_kernels(choice, dtype, device),
        "block_size": config.kv.block_size,
        "num_blocks": config.kv.num_blocks or "auto",
        "kv_memory_fraction": config.kv.memory_fraction,
        "enable_prefix_caching": config.kv.prefix_caching,
        "dtype": _dtype_name(dtype),
        "load_format": config.model.load_format,
        "device": str(device),
        "cpu_threads": torch.get_num_threads(),
        "row_multiple": row_multiple(device),
        "seed": config.seed,
    }


def _has_hopper_kernels(choice: KernelChoice, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether shapes that suit them get the kernels for compute capability 9.0."""
    if device.type != "cuda" or "triton" not in (choice.kernels, choice.attention):
        return False
    from kernels.hopper import runs_on

    return runs_on(device, dtype)


def _graphs_setting(config: LLMConfig, device: torch.device, sizes: GraphSizes | None) -> str:
    if sizes is not None:
        of_halves = f", in halves up to {sizes.in_halves[-1]}" if sizes.in_halves else ""
        of_prefills = ", prefill steps" if sizes.tokens else ""
        return f"decode steps of 1 to {sizes.decodes[-1]} sequences{of_halves}{of_prefills}"
    if config.engine.enforce_eager:
        return "off (enforce_eager)"
    return "off (a CPU has none)" if device.type == "cpu" else "off (the reference kernels wait for the device)"


def _architecture(c: Qwen3Config) -> dict[str, object]:
    return {
        "num_layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "dtype": c.dtype,
    }
