"""The embedded model beside transformers' own batched generate: same weights, same prompts, same process, in turn."""

import json
import time
from pathlib import Path

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models.source import resolve_model

PROMPTS = Path(__file__).parent / "data" / "tiny_prompts.jsonl"
ROUNDS = 5
MAX_TOKENS = 256


def run() -> None:
    """Greedy, float32, on the CPU, from token ids; each engine stops a row at its end-of-sequence token."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    directory = resolve_model("tiny").directory
    assert directory is not None
    conversations = [json.loads(line)["messages"] for line in PROMPTS.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", pad_token="<|endoftext|>")
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    ours, theirs = [], []
    for _ in range(ROUNDS):
        tokens, seconds = _ours(prompts)
        ours.append(tokens / seconds)
        theirs.append(tokens / _theirs(model, batch))
        print(f"nanovllm {ours[-1]:.0f} tok/s, transformers {theirs[-1]:.0f} tok/s, ratio {ours[-1] / theirs[-1]:.2f}")
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        json.dumps(
            {
                "benchmark": "transformers",
                "rows": len(conversations),
                "threads": torch.get_num_threads(),
                "tokens_per_s": round(max(ours)),
                "transformers_tokens_per_s": round(max(theirs)),
                "median_ratio": round(ratios[len(ratios) // 2], 2),
            }
        )
    )


def _ours(prompts: list[list[int]]) -> tuple[int, float]:
    """Output tokens and seconds; a new engine each time, so that no prefix is cached from the last round."""
    llm = LLM("tiny", dtype="float32", device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(output.token_ids) for output in outputs), time.perf_counter() - start


@torch.inference_mode()
def _theirs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds for the whole batch."""
    start = time.perf_counter()
    model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False)  # pyright: ignore[reportCallIssue]
    return time.perf_counter() - start
