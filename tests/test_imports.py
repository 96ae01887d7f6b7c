"""What an import costs: the core brings in no heavy library and leaves the program's own logging alone."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "hydra", "omegaconf", "triton", "tqdm")
ENGINE = (
    "nanovllm.engine",
    "nanovllm.engine.block_manager",
    "nanovllm.engine.commit",
    "nanovllm.engine.llm_engine",
    "nanovllm.engine.plan",
    "nanovllm.engine.running",
    "nanovllm.engine.scheduler",
    "nanovllm.engine.sequence",
)


def after_importing(module: str) -> dict[str, list[str]]:
    """Heavy modules and handlers of the root logger, in a fresh interpreter."""
    script = (
        f"import {module}, json, logging, sys\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "handlers = [repr(handler) for handler in logging.getLogger().handlers]\n"
        "print(json.dumps({'heavy': heavy, 'root handlers': handlers}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["nanovllm", "nanovllm.config", "nanovllm.sampling_params", "nanovllm.errors"])
def test_importing_the_package_or_its_configuration_loads_nothing_heavy(module: str) -> None:
    """`--help`, `--cfg job` and tab completion need no more than this."""
    assert after_importing(module) == {"heavy": [], "root handlers": []}


@pytest.mark.parametrize("module", ["nanovllm.events", *ENGINE])
def test_the_engine_needs_neither_torch_nor_any_other_heavy_library(module: str) -> None:
    assert after_importing(module) == {"heavy": [], "root handlers": []}


def test_a_cpu_needs_no_triton() -> None:
    """It is an extra of GPU machines; here it stands for a package that is not there."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from nanovllm import LLM, SamplingParams\n"
        "llm = LLM('tiny', device='cpu', num_kvcache_blocks=64)\n"
        "print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2), use_tqdm=False)[0].token_ids)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_distribution_named_kernels_is_not_installed() -> None:
    """The hub's `kernels` would stand in for this project's package of that name, or be hidden by it.

    transformers asks for that distribution by name and, where it is installed, imports `kernels` and gets ours; so
    the two cannot share an environment, and importing the model classes that we compare with would fail.
    """
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")
