"""A batch LLM job runner with a flight recorder."""

import importlib
from typing import TYPE_CHECKING

from nanovllm.logging.setup import configure_library_logging

if TYPE_CHECKING:
    from nanovllm.llm import LLM, CompletionOutput, RequestOutput
    from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "nanovllm.llm",
    "RequestOutput": "nanovllm.llm",
    "CompletionOutput": "nanovllm.llm",
    "SamplingParams": "nanovllm.sampling_params",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, when it is asked for: nanovllm.llm brings torch, the scheduler must not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


configure_library_logging()
