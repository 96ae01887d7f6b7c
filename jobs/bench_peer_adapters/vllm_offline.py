"""vLLM's offline interface, with random weights of its own and without a tokenizer."""

import os
from typing import Any

from harness import Job, main


class VLLM:
    def __init__(self, package: Any, job: Job) -> None:
        self._package = package
        self._temperature = job["temperature"]
        weights = any(name.endswith(".safetensors") for name in os.listdir(job["model"]))
        self._llm = package.LLM(
            model=job["model"],
            load_format="auto" if weights else "dummy",
            skip_tokenizer_init=True,
            dtype=job["dtype"],
            enforce_eager=job["enforce_eager"],
            max_model_len=job["max_model_len"],
            max_num_seqs=job["max_num_seqs"],
            max_num_batched_tokens=job["max_num_batched_tokens"],
            enable_prefix_caching=True,
        )

    def request(self, prompts: list[list[int]], output_lens: list[int]) -> Any:
        params = self._package.SamplingParams
        return [{"prompt_token_ids": ids} for ids in prompts], [
            params(temperature=self._temperature, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in output_lens
        ]

    def generate(self, request: Any) -> Any:
        prompts, params = request
        return self._llm.generate(prompts, params, use_tqdm=False)

    def output_lens(self, answer: Any) -> list[int]:
        return [len(output.outputs[0].token_ids) for output in answer]


if __name__ == "__main__":
    main(VLLM)
