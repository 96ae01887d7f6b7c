"""The same weights give the same logits and the same greedy tokens as transformers, however the work is cut up."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from nanovllm.models.source import resolve_model
from nanovllm.sampling_params import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.runner.harness import build

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

SHAPES = {
    "gqa1-head32-tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
    "gqa2-head64-untied": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False,
    },
    "gqa4-head128-tied": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "rope_theta": 1e6},
}  # fmt: skip


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = random_prompts([1, 15, 16, 17, 40, 100])


@pytest.fixture(scope="module", params=[*SHAPES, "tiny"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny":
        embedded = resolve_model("tiny").directory
        assert embedded is not None
        return embedded
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(directory, hidden_size=64, intermediate_size=96, **SHAPES[request.param])
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[tuple[list[int], torch.Tensor]]:
    """For each prompt, transformers' 64 greedy tokens and the logits they were taken from, each prompt alone."""
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    return [greedy(model, prompt, 64) for prompt in PROMPTS]


@torch.inference_mode()
def greedy(model: Qwen3ForCausalLM, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    ids, rows, cache = torch.tensor([prompt]), [], None
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1])
        ids = rows[-1].argmax()[None, None]
    logits = torch.stack(rows)
    return logits.argmax(-1).tolist(), logits


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_logits_and_greedy_tokens_equal_transformers(
    checkpoint: Path, expected: list[tuple[list[int], torch.Tensor]], block_size: int
) -> None:
    harness = build(checkpoint, block_size=block_size, max_num_seqs=8, max_num_batched_tokens=50)
    outputs = harness.run(PROMPTS, GREEDY)
    assert harness.counters.chunked_prefills > 0
    assert harness.counters.mixed_steps > 0
    for row, (tokens, logits) in enumerate(expected):
        assert outputs[row].token_ids == tokens
        first = len(PROMPTS[row])
        ours = torch.stack([harness.logits[row, first + i] for i in range(64)])
        assert (ours - logits).abs().max() < 1e-4


def test_a_prefix_hit_gives_the_tokens_of_a_miss(
    checkpoint: Path, expected: list[tuple[list[int], torch.Tensor]]
) -> None:
    harness = build(checkpoint)
    cold = [output.token_ids for output in harness.run(PROMPTS, GREEDY)]
    assert harness.counters.cached_tokens == 0
    warm = [output.token_ids for output in harness.run(PROMPTS, GREEDY)]
    assert harness.counters.cached_tokens == 16 + 32 + 96  # the full blocks before each prompt's last token
    assert warm == cold == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("block_size", [1, 16])
def test_forced_preemption_changes_no_token(
    checkpoint: Path, expected: list[tuple[list[int], torch.Tensor]], block_size: int
) -> None:
    harness = build(checkpoint, block_size=block_size, num_blocks=-(-260 // block_size), max_num_seqs=6)
    outputs = harness.run(PROMPTS, GREEDY)
    assert harness.counters.preemptions > 0
    assert [output.token_ids for output in outputs] == [tokens for tokens, _ in expected]
