"""The workload benchmark: our engine, or a peer, on fixed token ids, beside the roofline of the GPU."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from jobs import provenance
from jobs.bench_config import BenchConfig
from jobs.bench_peer import check_peer, run_peer
from jobs.bench_report import Round, WorkloadResult, table
from jobs.command import CHECKOUT, EXIT_COMPLETE, Command, Run
from jobs.roofline import GPUS, NUM_RUNNING, bound_s, costs
from jobs.summary import show
from jobs.usage import UsageError
from jobs.workloads import WORKLOADS, Sizes, Workload
from nanovllm.config import EngineConfig, LLMConfig
from nanovllm.errors import ModelError, SettingError
from nanovllm.models.checkpoint import check_checkpoint
from nanovllm.models.model_config import Qwen3Config, parse_config
from nanovllm.models.source import ModelSource, resolve_model

LENGTHS_STEP = 256
"""engine.max_model_len is a multiple of it, where the model is long enough."""
PEER_SETTINGS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "enforce_eager")
"""Those of the engine's that a peer has too."""
BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(config: BenchConfig) -> None:
    """Looks at model and peer as far as that goes in milliseconds and without torch."""
    source = _source(config)
    check_checkpoint(source)
    model = parse_config(source.config)
    for name in config.workload:
        _engine_config(config, name, model)
    if config.bench.peer is not None:
        check_peer(config.bench.peer, config.path, config.bench.python)


def run(config: BenchConfig, run: Run) -> int:
    source = _source(config)
    model = parse_config(source.config)
    if config.bench.peer is None:
        facts, results = _ours(config, run, model)
    else:
        facts, results = _theirs(config, run, source, model)
    report = {
        "benchmark": "workloads",
        **facts,
        "git": provenance.git(CHECKOUT),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": config.model.path,
        "load_format": config.model.load_format,
        "temperature": config.bench.temperature,
        "scale": config.bench.scale,
        "workloads": {result.name: result.facts() for result in results},
    }
    run.manifest.record(device=facts["device"], benchmark=report)
    show(table(results, str(facts["device"])))
    show(json.dumps(report))
    return EXIT_COMPLETE


def _source(config: BenchConfig) -> ModelSource:
    return resolve_model(config.model.path, config.model.revision, config.model.load_format)


def _sizes(config: BenchConfig, model: Qwen3Config) -> Sizes:
    return Sizes(scale=config.bench.scale, vocab_size=model.vocab_size)


def _engine_config(config: BenchConfig, name: str, model: Qwen3Config) -> EngineConfig:
    """For one workload, with the length that it needs. ModelError where that is more than there is."""
    engine = config.engine.over(WORKLOADS[name])
    need, most = WORKLOADS[name].longest_len(_sizes(config, model)), model.max_position_embeddings
    if need > most:
        raise ModelError(
            f"workload={name}: its longest sequence has {need} tokens, more than the model's "
            f"max_position_embeddings={most}; choose another model or a smaller bench.scale"
        )
    asked = engine.max_model_len
    if asked is None:
        return replace(engine, max_model_len=min(most, -(-need // LENGTHS_STEP) * LENGTHS_STEP))
    if not need <= asked <= most:
        raise ModelError(f"engine.max_model_len={asked}: must be an integer from {need} to {most} for workload={name}")
    return engine


def _seeds(config: BenchConfig) -> list[int]:
    """Those of the rounds that warm up, then those of the timed ones."""
    return [config.bench.seed + n for n in range(config.bench.warmup + config.bench.rounds)]


def _ours(config: BenchConfig, run: Run, model: Qwen3Config) -> tuple[dict[str, Any], list[WorkloadResult]]:
    from jobs.bench_rounds import EngineShelf, choose_threads

    choose_threads(model)
    shelf = EngineShelf(run.clock.now_ns, run.phase)
    device, dtype = "", ""
    results = []
    for name in config.workload:
        engine = _engine_config(config, name, model)
        llm = LLMConfig(
            model=config.model,
            parallel=config.parallel,
            kv=config.kv,
            engine=engine,
            device=config.device,
            seed=config.bench.seed,
        )
        try:
            assembly = shelf.engine(llm)
        except SettingError as error:
            raise UsageError(str(error)) from error
        device, dtype = assembly.device, str(assembly.settings["dtype"])
        with run.phase("generate"):
            rounds = _rounds(config, name, assembly, _bounds(model, engine, device, dtype))
        results.append(_result(name, assembly.facts(), rounds))
        del assembly  # the next engine needs its memory
    return {"engine": "nanovllm", "device": device, "torch": metadata.version("torch"), "dtype": dtype}, results


def _rounds(config: BenchConfig, name: str, assembly: Any, bounded: Callable[[Round, Workload], Round]) -> list[Round]:
    """The timed ones; with recorder=both a pair for each seed, the first of them with the recorder."""
    from jobs.bench_rounds import run_round

    sizes = _sizes(config, assembly.model_config)
    modes = {"on": (True,), "off": (False,), "both": (True, False)}[config.bench.recorder]
    rounds = []
    for number, seed in enumerate(_seeds(config)):
        load = WORKLOADS[name].build(seed, sizes)
        for with_recorder in modes:
            done = run_round(
                assembly, load, seed=seed, temperature=config.bench.temperature, with_recorder=with_recorder
            )
            if number >= config.bench.warmup:
                rounds.append(bounded(done, load))
            load = load.mirrored(sizes.top_id)
    return rounds


def _theirs(
    config: BenchConfig, run: Run, source: ModelSource, model: Qwen3Config
) -> tuple[dict[str, Any], list[WorkloadResult]]:
    results, facts = [], {}
    dtype = model.dtype if config.model.dtype == "auto" else config.model.dtype
    for name in config.workload:
        engine = _engine_config(config, name, model)
        loads = {seed: WORKLOADS[name].build(seed, _sizes(config, model)) for seed in _seeds(config)}
        with run.phase("generate"):
            answer = run_peer(config, source, engine, dtype, loads)
        bounded = _bounds(model, engine, answer.device, dtype)
        timed = answer.rounds[config.bench.warmup :]
        settings = {key: value for key, value in asdict(engine).items() if key in PEER_SETTINGS}
        results.append(_result(name, settings, [bounded(done, loads[done.seed]) for done in timed]))
        facts = {
            "engine": config.bench.peer,
            "device": answer.device,
            "torch": answer.torch,
            "dtype": dtype,
            "peer": answer.facts,
        }
    return facts, results


def _result(name: str, settings: dict[str, object], rounds: list[Round]) -> WorkloadResult:
    return WorkloadResult(name=name, counts_input=WORKLOADS[name].counts_input, settings=settings, rounds=rounds)


def _bounds(model: Qwen3Config, engine: EngineConfig, device: str, dtype: str) -> Callable[[Round, Workload], Round]:
    """Puts the bounds of its workload beside a round, where the device's speed is known."""
    gpu = GPUS.get(device)
    price = costs(model, BYTES_OF[dtype])
    num_running = max(NUM_RUNNING, engine.max_num_seqs)

    def bounded(done: Round, load: Workload) -> Round:
        if gpu is None:
            return done
        plain = bound_s(load, price, gpu, num_running=num_running)
        cascade = bound_s(load, price, gpu, num_running=num_running, cascade=True) if load.num_shared else None
        return replace(done, bound_s=plain, cascade_bound_s=cascade)

    return bounded


COMMAND = Command(module="jobs.bench", config_name="bench", schema=BenchConfig, check=check, run=run)
