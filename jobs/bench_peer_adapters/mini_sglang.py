"""mini-sglang (sgl-project/mini-sglang, read at 20fcd7f). Its timed call also turns ids into text."""

import importlib
from typing import Any

from harness import Job, main

PAGE_SIZE = 256
"""As in its own offline benchmark."""
LARGEST_GRAPH = 512


class MiniSGLang:
    def __init__(self, package: Any, job: Job) -> None:
        import torch

        self._temperature = job["temperature"]
        self._params = importlib.import_module("minisgl.core").SamplingParams
        self._llm = package.LLM(
            job["model"],
            dtype=getattr(torch, job["dtype"]),
            max_seq_len_override=job["max_model_len"],
            max_running_req=job["max_num_seqs"],
            max_extend_tokens=job["max_num_batched_tokens"],
            cuda_graph_max_bs=0 if job["enforce_eager"] else min(job["max_num_seqs"], LARGEST_GRAPH),
            page_size=PAGE_SIZE,
        )

    def request(self, prompts: list[list[int]], output_lens: list[int]) -> Any:
        return prompts, [
            self._params(temperature=self._temperature, ignore_eos=True, max_tokens=length) for length in output_lens
        ]

    def generate(self, request: Any) -> Any:
        return self._llm.generate(*request)

    def output_lens(self, answer: Any) -> list[int]:
        return [len(output["token_ids"]) for output in answer]


if __name__ == "__main__":
    main(MiniSGLang)
