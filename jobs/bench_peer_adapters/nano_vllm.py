"""nano-vllm (GeeeekExplorer/nano-vllm, read at bb823b3). Its timed call also turns ids into text."""

from typing import Any

from harness import Job, main


class NanoVLLM:
    def __init__(self, package: Any, job: Job) -> None:
        self._package = package
        self._temperature = job["temperature"]
        self._llm = package.LLM(
            job["model"],
            enforce_eager=job["enforce_eager"],
            max_model_len=job["max_model_len"],
            max_num_seqs=job["max_num_seqs"],
            max_num_batched_tokens=job["max_num_batched_tokens"],
        )

    def request(self, prompts: list[list[int]], output_lens: list[int]) -> Any:
        params = self._package.SamplingParams
        return prompts, [
            params(temperature=self._temperature, ignore_eos=True, max_tokens=length) for length in output_lens
        ]

    def generate(self, request: Any) -> Any:
        prompts, params = request
        return self._llm.generate(prompts, params, use_tqdm=False)

    def output_lens(self, answer: Any) -> list[int]:
        return [len(output["token_ids"]) for output in answer]


if __name__ == "__main__":
    main(NanoVLLM)
