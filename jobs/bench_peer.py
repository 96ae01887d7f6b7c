"""Another engine on the same workloads: in a process of its own, where its checkout is and ours is not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import provenance
from jobs.bench_config import BenchConfig
from jobs.bench_report import Round
from jobs.command import CHECKOUT
from jobs.workloads import Workload
from nanovllm.config import EngineConfig
from nanovllm.models.model_config import parse_config
from nanovllm.models.source import ModelSource, resolve_model

ADAPTERS = Path(__file__).parent / "bench_peer_adapters"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STOP_S = 20.0
STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How a peer is reached."""

    adapter: str
    """A file of bench_peer_adapters/."""
    module: str
    """What is imported."""
    package: str
    """Where that lies in its checkout, below `source`."""
    source: str = "."
    """What is put on the path."""
    needs_weights: bool = True
    """Whether it can only read weights, rather than make random ones that give finite logits."""


PEERS = {
    "nano-vllm": Peer(adapter="nano_vllm.py", module="nanovllm", package="nanovllm"),
    "mini-sglang": Peer(adapter="mini_sglang.py", module="minisgl.llm", package="minisgl", source="python"),
    "vllm": Peer(adapter="vllm_offline.py", module="vllm", package="vllm", needs_weights=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a peer's process reports."""

    device: str
    """The device's own name; cpu where the peer used none."""
    torch: str | None
    facts: dict[str, Any]
    """Its name, version and commit."""
    rounds: list[Round]
    """In the order in which they ran, those that warm up included."""


def check_peer(name: str, path: str | None, python: str | None) -> None:
    """Raises ValueError where the checkout holds no such peer, or the interpreter is none."""
    peer = PEERS[name]
    if path is not None and not _root(peer, path).joinpath(peer.package).is_dir():
        raise ValueError(
            f"path={path}: holds no {Path(peer.source, peer.package)}, the package of bench.peer={name}; "
            "give the top directory of its checkout"
        )
    if python is not None and shutil.which(python) is None:
        raise ValueError(f"bench.python={python}: must be a Python interpreter that can be run")


def run_peer(
    config: BenchConfig, source: ModelSource, engine: EngineConfig, dtype: str, loads: Mapping[int, Workload]
) -> Answer:
    """Runs the loads in turn, each by its seed; RuntimeError when the peer's process fails or leaves tokens out."""
    name = str(config.bench.peer)
    peer = PEERS[name]
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as directory:
        place = Path(directory)
        job = {
            "module": peer.module,
            "root": None if config.path is None else str(_root(peer, config.path)),
            "not_from": str(CHECKOUT),
            "model": str(_model(peer, source, dtype, config.bench.seed, place / "model")),
            "dtype": dtype,
            "temperature": config.bench.temperature,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "enforce_eager": engine.enforce_eager,
            "rounds": [
                {"seed": seed, "prompts": load.prompts, "output_lens": load.output_lens} for seed, load in loads.items()
            ],
        }
        result = _in_its_process(name, peer, config.bench.python or sys.executable, job, place)
    commit = None if config.path is None else provenance.git(Path(config.path).resolve())
    return Answer(
        device=result["device"],
        torch=result["torch"],
        facts={"name": name, "version": result["version"], "package": result["package"], "git": commit},
        rounds=[_round(name, r, loads[r["seed"]]) for r in result["rounds"]],
    )


def _root(peer: Peer, path: str) -> Path:
    return (Path(path) / peer.source).resolve()


def _round(name: str, result: Mapping[str, Any], load: Workload) -> Round:
    """Counts the tokens that came. A last token may be missing where a peer takes it for the end of the text."""
    lengths = result["output_lens"]
    for row, (got, asked) in enumerate(zip(lengths, load.output_lens, strict=True)):
        if not asked - 1 <= got <= asked:
            raise RuntimeError(f"bench.peer={name}: gave {got} of {asked} tokens for sequence {row}")
    return Round(
        seed=result["seed"],
        seconds=result["seconds"],
        num_prompt_tokens=load.num_prompt_tokens,
        num_output_tokens=sum(lengths),
    )


def _in_its_process(name: str, peer: Peer, python: str, job: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The adapters are copied away first: Python puts a script's own directory on its path."""
    scripts = place / "adapters"
    shutil.copytree(ADAPTERS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    job_file, result_file = place / "job.json", place / "result.json"
    job_file.write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if job["root"] is not None:
        environment["PYTHONPATH"] = job["root"]
    words = [python, str(scripts / peer.adapter), str(job_file), str(result_file)]
    code = _run(words, place, environment)
    if code != 0 or not result_file.exists():
        raise RuntimeError(f"bench.peer={name}: its process ended with exit code {code}; what it said stands above")
    return json.loads(result_file.read_text())


def _run(words: list[str], place: Path, environment: Mapping[str, str]) -> int:
    """Its exit code. What it prints goes to standard error; whatever ends this process's wait ends its group too."""
    process = subprocess.Popen(
        words, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=STDERR, start_new_session=True
    )
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _model(peer: Peer, source: ModelSource, dtype: str, seed: int, place: Path) -> Path:
    """The model's own directory or, for random weights, one of its shape with the embedded model's tokenizer."""
    if source.weight_files and source.directory is not None:
        return source.directory.resolve()
    place.mkdir()
    names = {"dtype": dtype, "torch_dtype": dtype}
    (place / "config.json").write_text(json.dumps({**source.config, **names}))
    tiny = resolve_model("tiny").directory
    assert tiny is not None
    for name in TOKENIZER_FILES:
        shutil.copy(tiny / name, place)
    if peer.needs_weights:
        _write_weights(source, dtype, seed, place / "model.safetensors")
    return place


def _write_weights(source: ModelSource, dtype: str, seed: int, path: Path) -> None:
    """As load_format=dummy makes them for our own engine: norms 1, the rest normal."""
    import torch
    from safetensors.torch import save_file

    from nanovllm.models.weights import DUMMY_STD

    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    tensors = {
        name: torch.ones(shape, dtype=kind)
        if len(shape) == 1
        else torch.empty(shape, dtype=kind).normal_(0.0, DUMMY_STD, generator=generator)
        for name, shape in parse_config(source.config).tensor_shapes().items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
