"""What every adapter does in the peer's process: find the peer and nothing of ours, time the rounds, report.

Run as `python ADAPTER.py JOB.json RESULT.json`; imports nothing but the standard library and the peer.
"""

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Job = dict[str, Any]
OURS = ("nanovllm", "kernels", "jobs")


class Engine(Protocol):
    """A peer's engine, built and ready."""

    def request(self, prompts: list[list[int]], output_lens: list[int]) -> Any:
        """What `generate` takes; its making is not timed."""
        ...

    def generate(self, request: Any) -> Any:
        """The timed part: from handing over the prompts until all tokens are there."""
        ...

    def output_lens(self, answer: Any) -> list[int]: ...


def main(build: Callable[[Any, Job], Engine]) -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    package = _import_peer(job)
    engine = build(package, job)
    rounds = [_round(engine, r) for r in job["rounds"]]
    _check_nothing_of_ours(job)
    result = {
        "rounds": rounds,
        "package": str(package.__file__),
        "version": getattr(package, "__version__", None),
        "device": _device(),
        "torch": getattr(sys.modules.get("torch"), "__version__", None),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def _round(engine: Engine, r: dict[str, Any]) -> dict[str, Any]:
    request = engine.request(r["prompts"], r["output_lens"])
    gc.collect()
    gc.freeze()  # as for our own engine
    start = time.perf_counter()
    answer = engine.generate(request)
    seconds = time.perf_counter() - start
    gc.unfreeze()
    return {"seed": r["seed"], "seconds": seconds, "output_lens": engine.output_lens(answer)}


def _import_peer(job: Job) -> Any:
    _hide_ours(job["not_from"])
    package = importlib.import_module(job["module"])
    found, root = Path(str(package.__file__)).resolve(), job["root"]
    if root is not None and Path(root) not in found.parents:
        raise SystemExit(f"{job['module']} was imported from {found}, not from path={root}")
    return package


def _hide_ours(checkout: str) -> None:
    """Takes away what an editable installation of ours, of whichever checkout, put into this interpreter."""
    sys.path[:] = [entry for entry in sys.path if entry != checkout]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _finds_ours(finder)]


def _finds_ours(finder: Any) -> bool:
    mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", {})
    return set(OURS) <= set(mapping)


def _check_nothing_of_ours(job: Job) -> None:
    for name in OURS:
        found = getattr(sys.modules.get(name), "__file__", None)
        if found is not None and Path(found).resolve().parent == Path(job["not_from"]) / name:
            raise SystemExit(f"{name} was imported from our own checkout: {found}")


def _device() -> str:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "cpu"
