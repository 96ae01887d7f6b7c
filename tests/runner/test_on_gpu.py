"""The same engine on a CUDA device: look-ahead, memory sizing, and the answers of the CPU."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm.errors import PromptError
from nanovllm.models.qwen3 import Qwen3ForCausalLM as Qwen3ForCausalLMOfOurs
from nanovllm.prompt_worker import PromptWorker
from nanovllm.prompts import Conversation
from nanovllm.runner import attention_work
from nanovllm.runner.halves import Halves
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.step_graphs import StepShape
from nanovllm.sampling_params import SamplingParams
from nanovllm.text import load_tokenizer
from tests.checkpoints import write_checkpoint
from tests.runner.harness import Harness, build
from tests.runner.test_transformers_parity import PROMPTS, random_prompts

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0.0, max_tokens=150)
DATA = Path(__file__).parents[2] / "jobs" / "data" / "tiny_prompts.jsonl"
MODELS = Path(__file__).parents[2] / "nanovllm" / "models"
TINY = Path(__file__).parents[2] / "nanovllm" / "models" / "tiny"


@pytest.fixture(scope="module")
def bundled() -> tuple[list[list[int]], list[str]]:
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    worker = PromptWorker(tokenizer.prompt_setup())
    prompts = worker.token_ids([Conversation(messages=row["messages"]) for row in rows])
    worker.close()
    assert not any(isinstance(ids, PromptError) for ids in prompts)
    return [list(map(int, ids)) for ids in prompts], [row["answer"] for row in rows]  # pyright: ignore[reportArgumentType]


def num_correct(harness: Harness, prompts: list[list[int]], answers: list[str]) -> int:
    outputs = harness.run(prompts, GREEDY)
    texts = [harness.assembly.intake.text(output) or "" for output in outputs]
    return sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True))


@pytest.fixture(scope="module")
def on_cpu(bundled: tuple[list[list[int]], list[str]]) -> list[list[int]]:
    return [o.token_ids for o in build("tiny").run(bundled[0], GREEDY)]


WAYS = {
    "reference": {"kernels": "reference", "attention": "reference"},
    "graphs": {},
    "eager": {"enforce_eager": True},
    "triton attention alone": {"kernels": "reference", "attention": "triton"},
    "blocks of 32": {"block_size": 32},
    "blocks of 256": {"block_size": 256},
    "chunks of 64": {"max_num_seqs": 64, "max_num_batched_tokens": 64},
    "chunks of 1000, eager": {"max_num_batched_tokens": 1000, "enforce_eager": True},
    "one at a time": {"max_num_seqs": 1},
    "seven at a time": {"max_num_seqs": 7},
    "no prefix caching": {"prefix_caching": False},
    "few blocks": {"num_blocks": 24},
    "few blocks, eager": {"num_blocks": 24, "enforce_eager": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_float32_gives_the_tokens_of_the_cpu(
    bundled: tuple[list[list[int]], list[str]], on_cpu: list[list[int]], way: str
) -> None:
    harness = build("tiny", device="cuda", **WAYS[way])  # pyright: ignore[reportArgumentType]
    assert harness.assembly.engine.runner.lookahead == 1
    assert [o.token_ids for o in harness.run(bundled[0], GREEDY)] == on_cpu
    assert any(event.dropped_seq_ids for event in harness.counters.steps)
    graphs = sum(event.result.cuda_graph for event in harness.counters.steps)
    assert (graphs == 0) == ("eager" in way or "reference" in str(WAYS[way]))
    if "few blocks" in way:
        assert harness.counters.preemptions > 0


@pytest.mark.parametrize("eager", [False, True])
def test_prefixes_read_apart_change_no_token(
    bundled: tuple[list[list[int]], list[str]],
    on_cpu: list[list[int]],
    eager: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovllm.runner.shared_prefixes.MIN_SAVED_TOKENS", 64)
    harness = build("tiny", device="cuda", max_num_batched_tokens=1000, enforce_eager=eager)
    members = []
    share_out = attention_work.share_out

    def spy(slots, lens, groups, *rest):
        members.append(sum(len(group.rows) for group in groups))
        return share_out(slots, lens, groups, *rest)

    monkeypatch.setattr(attention_work, "share_out", spy)
    assert [o.token_ids for o in harness.run(bundled[0], GREEDY)] == on_cpu
    assert max(members) >= 50


@pytest.fixture(scope="module")
def definition(
    bundled: tuple[list[list[int]], list[str]],
) -> tuple[list[list[int]], dict[tuple[int, int], torch.Tensor]]:
    """What the reference kernels make of the prompts in bfloat16: tokens, and the logits they were taken from."""
    harness = build("tiny", device="cuda", dtype="bfloat16", kernels="reference", attention="reference")
    expected = [output.token_ids for output in harness.run(bundled[0], GREEDY)]
    return expected, dict(harness.logits)


def count_steps_in_halves(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """Fills the list that it returns."""
    runner, halved = harness.assembly.engine.runner, []
    assert isinstance(runner, ModelRunner)
    if runner.graphs is not None:
        run = runner.graphs.run

        def spy(shape: StepShape) -> torch.Tensor:
            if shape.in_halves:
                halved.append(shape)
            return run(shape)

        monkeypatch.setattr(runner.graphs, "run", spy)
    return halved


BF16_BOUND = 0.5
"""How far apart the two best logits (of order 20, where bfloat16 has steps of 1/8) may be for rounding to swap them."""


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"enforce_eager": True},
        {"block_size": 256},
        {"block_size": 256, "attention": "flash_attn"},
        {"block_size": 256, "attention": "flash_attn", "enforce_eager": True},
        {"max_num_batched_tokens": 500},
        {"max_num_seqs": 100, "prefix_caching": False},  # steps in halves, once they are made to
    ],
)
def test_bfloat16_differs_only_where_the_best_two_tokens_are_close(
    bundled: tuple[list[list[int]], list[str]],
    definition: tuple[list[list[int]], dict[tuple[int, int], torch.Tensor]],
    way: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, answers = bundled
    expected, logits = definition
    monkeypatch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_TOKENS", 1)
    harness = build("tiny", device="cuda", dtype="bfloat16", **way)  # pyright: ignore[reportArgumentType]
    halved = count_steps_in_halves(harness, monkeypatch)
    actual = harness.run(prompts, GREEDY)
    assert len(halved) > 50 or "max_num_seqs" not in way
    for row, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        pairs = enumerate(zip(ours.token_ids, theirs, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is not None:
            best = logits[row, len(prompts[row]) + first].float().topk(2).values
            assert best[0] - best[1] < BF16_BOUND, f"row {row}, token {first}"
    texts = [harness.assembly.intake.text(output) or "" for output in actual]
    assert sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True)) >= 0.99 * len(prompts)


def logits_in_halves(path: Path, monkeypatch: pytest.MonkeyPatch, *, beside: bool) -> list[torch.Tensor]:
    """Logits of every step in halves that has no padding, of rows of 500 to 1,400 tokens."""
    monkeypatch.setattr("nanovllm.runner.graph_sizes.MIN_HALVES_TOKENS", 1)
    init, sample = Halves.__init__, Qwen3ForCausalLMOfOurs.sample
    last = torch.zeros(128, 320, dtype=torch.bfloat16, device="cuda")

    def one_stream(self: Halves, device: torch.device) -> None:
        init(self, torch.device("cpu"))

    def keep(self: Qwen3ForCausalLMOfOurs, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        last[: len(hidden)].copy_(self.lm_head(hidden)[:128])
        return sample(self, hidden, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Qwen3ForCausalLMOfOurs, "sample", keep)
        if not beside:
            patched.setattr(Halves, "__init__", one_stream)
        harness = build(path, device="cuda", dtype="bfloat16", max_num_seqs=128, prefix_caching=False)
    runner, found = harness.assembly.engine.runner, []
    assert isinstance(runner, ModelRunner)
    assert runner.graphs is not None
    run = runner.graphs.run

    def spy(shape: StepShape) -> torch.Tensor:
        tokens = run(shape)
        if shape.in_halves:
            found.append(last[: shape.num_tokens].clone())
        return tokens

    runner.graphs.run = spy
    prompts = random_prompts([500 + i * 37 % 880 for i in range(128)], seed=3)
    harness.run(prompts, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    counts = [step.schedule.plan.num_rows for step in harness.counters.steps if step.result.in_halves]
    return [logits for logits, count in zip(found, counts, strict=True) if len(logits) == count]


def test_halves_beside_each_other_compute_what_they_do_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: neither reads what the other is writing."""
    shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 6}
    width = {"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 2048}
    write_checkpoint(tmp_path, **shape, **width)
    alone = logits_in_halves(tmp_path, monkeypatch, beside=False)
    assert len(alone) > 30
    for _ in range(3):
        beside = logits_in_halves(tmp_path, monkeypatch, beside=True)
        assert len(beside) == len(alone)
        assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_a_chunk_of_which_nothing_samples_runs_eagerly(tmp_path: Path) -> None:
    """Then the last layer has no rows behind attention, whatever kernel its widths suit."""
    shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    write_checkpoint(tmp_path, **shape, hidden_size=1024, intermediate_size=3072, max_position_embeddings=8192)
    limits = {"max_num_batched_tokens": 2048, "max_num_seqs": 4, "dtype": "bfloat16"}
    harness = build(tmp_path, device="cuda", enforce_eager=True, **limits)  # pyright: ignore[reportArgumentType]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    outputs = harness.run(random_prompts([5000, 100], seed=6), params)
    assert [len(output.token_ids) for output in outputs] == [5, 5]
    assert harness.counters.chunked_prefills >= 2


def test_a_manifest_says_whether_the_engine_suits_halves() -> None:
    """Also where it has too few sequences for that."""

    def halves(dtype: str, **way: object) -> object:
        return build("tiny", device="cuda", dtype=dtype, **way).assembly.facts()["halves"]  # pyright: ignore[reportArgumentType]

    is_measured = torch.cuda.get_device_capability() >= (9, 0)
    assert halves("bfloat16") == halves("bfloat16", max_num_seqs=4) == halves("float16") == is_measured
    assert halves("float32") is halves("bfloat16", kernels="reference", attention="reference") is False


def test_a_manifest_says_whether_hoppers_kernels_run() -> None:
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    for dtype, expected in (("bfloat16", is_hopper), ("float32", False)):
        assert build("tiny", device="cuda", dtype=dtype).assembly.facts()["hopper_kernels"] == expected


def test_flash_attn_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"kv\.block_size=16 must be a multiple of 256"):
        build("tiny", device="cuda", dtype="bfloat16", attention="flash_attn")
    with pytest.raises(ValueError, match=r"model\.dtype must be bfloat16 or float16, not float32"):
        build("tiny", device="cuda", attention="flash_attn", block_size=256)


@pytest.mark.parametrize("num_prompts", [5, 40])
def test_logits_of_a_real_shape_err_no_more_than_transformers_do(tmp_path: Path, num_prompts: int) -> None:
    """Qwen3-0.6B's shape with random weights that bfloat16 holds exactly; errors are against float32."""
    shape = json.loads((MODELS / "configs" / "Qwen" / "Qwen3-0.6B" / "config.json").read_text())
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**shape)).to("cuda", torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path)
    harness = build(tmp_path, device="cuda", dtype="bfloat16", enforce_eager=True, max_model_len=512)
    prompts = random_prompts([1, 17, 64, 200, 333, *range(20, 15 + num_prompts)], seed=4)
    outputs = harness.run(prompts, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    ours, ids = [], []
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ours.append(torch.stack([harness.logits[row, len(prompt) + i] for i in range(8)]))
        ids.append(torch.tensor([prompt + output.token_ids[:-1]], device="cuda"))
    with torch.inference_mode():
        rounded = [theirs(i).logits[0, -8:] for i in ids]
        theirs.float()
        exact = [theirs(i).logits[0, -8:] for i in ids]

    def error(logits: list[torch.Tensor]) -> float:
        return float((torch.cat(logits).double() - torch.cat(exact).double()).square().mean().sqrt())

    assert 0 < error(ours) <= 1.5 * error(rounded)


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
    harness = build("tiny", device="cuda", dtype="bfloat16", memory_fraction=0.9)
    taken = harness.assembly.kv_bytes
    assert 0.5 * free_before < taken <= 0.9 * free_before
    result = harness.counters
    harness.run([[5, 6, 7]], GREEDY)
    assert result.steps[-1].result.device_allocated_bytes >= taken
    assert all(step.result.forward_ms > 0 for step in result.steps)
