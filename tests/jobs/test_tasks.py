"""The task generators, the bundled prompts, and the checkpoint that answers them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from jobs.scoring import score
from jobs.tasks import (
    SYSTEM,
    TASKS,
    bundled_prompts,
    chat,
    examples,
    held_out_examples,
    is_correct,
    is_held_out,
)

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "nanovllm" / "models" / "tiny"
PROMPTS = ROOT / "jobs" / "data" / "tiny_prompts.jsonl"


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")


@pytest.mark.parametrize("task", TASKS)
def test_a_generator_is_a_function_of_the_seed(task):
    first, second = (TASKS[task](random.Random(7)) for _ in range(2))
    assert first == second
    assert first.task == task
    assert len({TASKS[task](random.Random(seed)).prompt for seed in range(50)}) > 40


@pytest.mark.parametrize("task", TASKS)
def test_the_checker_accepts_the_answer_and_nothing_else(task):
    for example in held_out_examples(task, 20, "checker"):
        assert is_correct(example.answer, example.answer)
        assert is_correct(f" {example.answer}\n", example.answer)
        assert not is_correct(example.answer[:-1], example.answer)
        assert not is_correct(example.answer + "0", example.answer)
        assert not is_correct("", example.answer)


@pytest.mark.parametrize("task", TASKS)
def test_training_never_sees_a_held_out_question(task):
    trained = {example.prompt for example in itertools.islice(examples(task, 3, held_out=False), 3000)}
    held_out = {example.prompt for example in held_out_examples(task, 50, 3)}
    assert len(held_out) == 50
    assert not trained & held_out
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, trained))


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'divide': choose one of add"):
        next(examples("divide", 0, held_out=True))


def test_answers_follow_from_their_questions():
    for example in held_out_examples("add", 20, "meaning"):
        _, _, first, _, second = example.prompt.rstrip("?").split()
        assert int(example.answer) == int(first) + int(second)
    for example in held_out_examples("reverse_words", 20, "meaning"):
        assert example.answer.split() == example.prompt.split(": ")[1].split()[::-1]
    for example in held_out_examples("json_field", 20, "meaning"):
        name = example.prompt.split('"')[1]
        assert example.answer == str(json.loads(example.prompt[example.prompt.index("{") :])[name])
    for example in held_out_examples("replace_word", 20, "meaning"):
        words = example.prompt.split()
        old, new = words[1], words[3]
        assert old not in example.answer.split()
        assert new in example.answer.split()


def test_the_bundled_prompts_are_what_the_generator_makes(prompts):
    assert prompts == bundled_prompts()
    assert len(prompts) == len({row["id"] for row in prompts}) == 200
    assert {row["task"] for row in prompts} == set(TASKS)
    assert all(row["messages"][0] == {"role": "system", "content": SYSTEM} for row in prompts)
    assert all(is_held_out(row["messages"][-1]["content"]) for row in prompts)


def test_score_matches_generations_by_row_and_counts_missing_ones_as_wrong(prompts):
    rows = prompts[:4]
    generations = [
        {"row": 2, "sample": 0, "text": rows[2]["answer"]},
        {"row": 0, "sample": 1, "text": "another sample"},
        {"row": 0, "sample": 0, "text": rows[0]["answer"] + "\n"},
        {"row": 1, "sample": 0, "text": "wrong"},
    ]
    result = score(rows, generations)
    assert (result.num_correct, result.num_total, result.accuracy) == (2, 4, 0.5)
    assert sum(right for right, _ in result.by_task.values()) == 2
    assert sum(asked for _, asked in result.by_task.values()) == 4


def test_score_refuses_rows_that_cannot_be_matched(prompts):
    with pytest.raises(ValueError, match="row 9 has no prompt"):
        score(prompts[:2], [{"row": 9, "sample": 0, "text": ""}])
    with pytest.raises(ValueError, match="row 0 comes twice"):
        score(prompts[:2], [{"row": 0, "sample": 0, "text": ""}] * 2)


def test_the_tokenizer_gives_every_text_back(tokenizer, prompts):
    for row in prompts:
        for text in (row["messages"][-1]["content"], row["answer"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    other = "Grüße, 東京! \t 12345\n\n  <b>"
    assert tokenizer.decode(tokenizer.encode(other)) == other
    assert len(tokenizer.encode("90210")) == 5


def test_the_chat_template_is_chatml(tokenizer, prompts):
    end, start, stop = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (stop, end, None)
    for row in prompts:
        system, user = (message["content"] for message in row["messages"])
        text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids == tokenizer.encode(text)
        assert [token for token in ids if token in (end, start, stop)] == [start, stop, start, stop, start]
        assert len(ids) + len(tokenizer.encode(row["answer"])) < 256
    system_ids = tokenizer.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
    assert 48 <= len(system_ids) <= 64
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_turns_are_the_tokens_of_the_chat_template(tokenizer):
    tiny_rows = pytest.importorskip("jobs.tiny_rows")
    maker = tiny_rows.RowMaker(tokenizer.backend_tokenizer, 0)
    for task in TASKS:
        example = held_out_examples(task, 1, "turn")[0]
        (turn,) = maker.encode([example])
        messages = [*chat(example, None), {"role": "assistant", "content": example.answer}]
        assert [token if token >= 0 else ~token for token in turn] == tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False
        )
        answer = tokenizer.decode([~token for token in turn if token < 0])
        assert answer == f"{example.answer}<|im_end|>"


def test_the_checkpoint_is_complete_and_small():
    names = {path.name for path in CHECKPOINT.iterdir() if path.is_file()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8 * 2**20


def test_the_weights_are_bfloat16_and_tied():
    safetensors = pytest.importorskip("safetensors")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    with safetensors.safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - safe_open is no mapping
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        shape = weights.get_slice("model.embed_tokens.weight").get_shape()
    assert shape == [config["vocab_size"], config["hidden_size"]]
    assert config["vocab_size"] % 64 == 0
    assert config["tie_word_embeddings"]


def test_greedy_decoding_answers_bundled_prompts(tokenizer, prompts):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    rows = prompts[:24]
    batch = tokenizer.apply_chat_template(
        [row["messages"] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**batch, max_new_tokens=128)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    result = score(rows, [{"row": row, "sample": 0, "text": text} for row, text in enumerate(texts)])
    assert result.accuracy >= 0.95, result.by_task
