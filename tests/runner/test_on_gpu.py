"""The same engine on a CUDA device: look-ahead, memory sizing, and the answers of the CPU."""

import gc
import json
from pathlib import Path

import pytest
import torch

from nanovllm.sampling_params import SamplingParams
from nanovllm.text import load_tokenizer
from tests.checkpoints import write_checkpoint
from tests.runner.harness import Harness, build
from tests.runner.test_transformers_parity import PROMPTS

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0.0, max_tokens=150)
DATA = Path(__file__).parents[2] / "jobs" / "data" / "tiny_prompts.jsonl"
TINY = Path(__file__).parents[2] / "nanovllm" / "models" / "tiny"


@pytest.fixture(scope="module")
def bundled() -> tuple[list[list[int]], list[str]]:
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    return [tokenizer.apply_chat_template(row["messages"]) for row in rows], [row["answer"] for row in rows]


def num_correct(harness: Harness, prompts: list[list[int]], answers: list[str]) -> int:
    outputs = harness.run(prompts, GREEDY)
    texts = [harness.assembly.intake.text(output) or "" for output in outputs]
    return sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True))


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("num_blocks", [None, 2000])
def test_float32_gives_the_tokens_of_the_cpu(
    bundled: tuple[list[list[int]], list[str]], block_size: int, num_blocks: int | None
) -> None:
    prompts, _ = bundled
    on_cpu = [o.token_ids for o in build("tiny").run(prompts, GREEDY)]
    blocks = None if num_blocks is None else num_blocks * 16 // block_size
    harness = build("tiny", device="cuda", block_size=block_size, num_blocks=blocks)
    assert harness.assembly.engine.runner.lookahead == 1
    assert [o.token_ids for o in harness.run(prompts, GREEDY)] == on_cpu
    assert any(event.dropped_seq_ids for event in harness.counters.steps)


def test_bfloat16_answers_as_well_as_the_cpu(bundled: tuple[list[list[int]], list[str]]) -> None:
    prompts, answers = bundled
    assert num_correct(build("tiny", device="cuda", dtype="bfloat16"), prompts, answers) >= 0.95 * len(prompts)


def test_forced_preemption_under_look_ahead_changes_no_token(bundled: tuple[list[list[int]], list[str]]) -> None:
    prompts = bundled[0][:40]
    roomy = [o.token_ids for o in build("tiny", device="cuda").run(prompts, GREEDY)]
    tight = build("tiny", device="cuda", num_blocks=24)
    assert [o.token_ids for o in tight.run(prompts, GREEDY)] == roomy
    assert tight.counters.preemptions > 0


def test_sampling_draws_what_the_cpu_draws(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hidden_size=64, head_dim=64)
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, max_tokens=40, ignore_eos=True, seed=5)
    on_cpu = [o.token_ids for o in build(tmp_path).run(PROMPTS, params)]
    on_gpu = [o.token_ids for o in build(tmp_path, device="cuda", dtype="float32").run(PROMPTS, params)]
    same = sum(a == b for x, y in zip(on_cpu, on_gpu, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.95 * 40 * len(PROMPTS)  # a draw may differ where it falls within rounding of a boundary


def test_the_cache_takes_its_share_of_what_is_free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    harness = build("tiny", device="cuda", dtype="bfloat16")
    taken = harness.assembly.kv_bytes
    assert 0.5 * free_before < taken <= 0.9 * free_before
    result = harness.counters
    harness.run([[5, 6, 7]], GREEDY)
    assert result.steps[-1].result.device_allocated_bytes >= taken
    assert all(step.result.forward_ms > 0 for step in result.steps)
