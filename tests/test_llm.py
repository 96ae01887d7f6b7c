"""The engine from Python: what a caller of LLM can count on."""

import re
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ModelError
from nanovllm.llm import SETTINGS
from tests.checkpoints import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, tokenizer=True)
    return directory


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), num_gpu_blocks_override=200, max_num_seqs=8, device="cpu")


def test_text_and_ids_are_answered_in_order(llm: LLM) -> None:
    outputs = llm.generate(["Hello", [5, 6, 7], "sea shells"], GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs][1] == [5, 6, 7]
    for output in outputs:
        assert len(output.token_ids) == 12
        assert output.finish_reason == "length"
        assert output.outputs[0].index == 0
        assert output.text == output.outputs[0].text
        assert isinstance(output.text, str)


def test_one_params_object_or_one_for_each(llm: LLM) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    outputs = llm.generate([[5], [5]], [GREEDY, short], use_tqdm=False)
    assert [len(output.token_ids) for output in outputs] == [12, 3]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate([[5], [6]], [GREEDY], use_tqdm=False)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([], "prompt 1: the prompt is empty"),
        ([320], r"prompt 1: .*holds 320; ids of this model are 0 to 319"),
        ([-1], "prompt 1: .*holds -1"),
        ([5] * 512, r"prompt 1: the prompt has 512 tokens; .*max_model_len=512"),
        ("", "prompt 1: the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named_before_anything_runs(
    llm: LLM, prompt: str | list[int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        llm.generate([[5], prompt], GREEDY, use_tqdm=False)
    assert not llm._engine.has_work()


def test_a_sequence_larger_than_the_cache_is_refused(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), num_gpu_blocks_override=4, block_size=16, max_num_seqs=2)
    fits = SamplingParams(temperature=0.0, max_tokens=45, ignore_eos=True)  # 20 + 45 - 1 = 64 tokens of KV
    assert len(llm.generate([[5] * 20], fits, use_tqdm=False)[0].token_ids) == 45
    with pytest.raises(ValueError, match=r"prompt 0: .*need 5 KV blocks of 16 tokens for 66 tokens.*cache has 4"):
        llm.generate([[5] * 20], SamplingParams(max_tokens=46), use_tqdm=False)


def test_max_tokens_none_goes_up_to_what_the_cache_holds(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), num_gpu_blocks_override=4, block_size=16, max_num_seqs=2)
    output = llm.generate([[5] * 20], SamplingParams(temperature=0.0, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.token_ids) == 65 - 20
    assert output.finish_reason == "length"


@pytest.mark.parametrize("length", [510, 511])
def test_prompts_up_to_one_below_the_models_length_fit(llm: LLM, length: int) -> None:
    output = llm.generate([[5] * length], SamplingParams(temperature=0.0, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.token_ids) == 512 - length


def test_noise_depends_on_seed_and_index_alone(llm: LLM) -> None:
    prompts = [[5, 6], [7, 8], [9, 10]]
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=3)
    first = [o.token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    again = [o.token_ids for o in llm.generate([*prompts, [1, 2, 3]], params, use_tqdm=False)][:3]
    other = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=4)
    assert again == first
    assert [o.token_ids for o in llm.generate(prompts, other, use_tqdm=False)] != first
    same_prompt = llm.generate([[5, 6]] * 3, params, use_tqdm=False)
    assert len({tuple(o.token_ids) for o in same_prompt}) == 3


def test_chat_equals_the_template_given_as_ids(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    backed = llm.tokenizer._backed  # pyright: ignore[reportAttributeAccessIssue]
    ids = backed.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
    by_chat = llm.chat([conversation], GREEDY, use_tqdm=False)[0]
    assert by_chat.prompt_token_ids == ids
    assert llm.chat(conversation, GREEDY, use_tqdm=False)[0].token_ids == by_chat.token_ids


def test_chat_takes_what_goes_to_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well, I"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False, continue_final_message=True)
    backed = llm.tokenizer._backed  # pyright: ignore[reportAttributeAccessIssue]
    assert output.prompt_token_ids == backed.apply_chat_template(
        conversation, continue_final_message=True, tokenize=True, return_dict=False
    )
    with pytest.raises(ValueError, match="chat_template_kwargs has tools"):
        llm.chat(conversation, chat_template_kwargs={"tools": []})


@pytest.mark.parametrize("messages", [[3], "text", [[{"role": "user", "content": "x"}], []], [[3]]])
def test_what_is_no_conversation_is_named_by_its_index(llm: LLM, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt \d: messages must be a non-empty list of objects"):
        llm.chat(messages, use_tqdm=False)
    with pytest.raises(ValueError, match="prompt 1: the text is not valid Unicode"):
        llm.chat([[{"role": "user", "content": text}] for text in ("fine", "a\ud800")], use_tqdm=False)


def test_a_stop_string_ends_the_row_and_is_cut_from_the_text(llm: LLM) -> None:
    free = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0]
    assert free.text is not None
    needle = next(c for c in free.text[2:] if c.isascii() and c.isprintable())
    stopped = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=[needle]))
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == free.text[: free.text.index(needle)]
    assert stopped[0].token_ids == free.token_ids[: len(stopped[0].token_ids)]


def test_a_stop_token_ends_the_row_and_stays_in_its_ids(llm: LLM) -> None:
    free = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].token_ids
    token = free[4]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[token])
    output = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]
    assert output.token_ids == free[: free.index(token) + 1]
    assert output.finish_reason == "stop"


def test_an_unknown_setting_is_a_type_error_that_lists_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"unknown setting 'blok_size'.*block_size"):
        LLM("tiny", blok_size=16)
    with pytest.raises(TypeError, match="another name for the same setting"):
        LLM("tiny", block_size=16, kvcache_block_size=16)


def test_every_setting_of_the_contract_is_known() -> None:
    contract = """dtype load_format tensor_parallel_size max_model_len max_num_seqs max_num_batched_tokens
        kv_memory_fraction enable_prefix_caching enforce_eager seed block_size num_gpu_blocks_override
        kvcache_block_size num_kvcache_blocks"""
    assert set(contract.split()) <= set(SETTINGS)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"block_size": 0}, "kv.block_size=0: must be an integer from 1"),
        ({"max_model_len": 100_000}, "engine.max_model_len=100000: must be at most 512"),
        ({"dtype": "int8"}, "model.dtype=int8: must be one of"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, "engine.max_num_batched_tokens=63: must be at least"),
        ({"tensor_parallel_size": 2}, "parallel.tensor_parallel_size=2: must be 1"),
        ({"kernels": "cuda"}, "engine.kernels=cuda: must be one of"),
    ],
)
def test_a_setting_out_of_range_is_one_clear_error(
    checkpoint: Path, settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        LLM(str(checkpoint), **settings)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="/no/such/directory"):
        LLM("/no/such/directory")


def test_dummy_weights_of_a_named_model_need_no_network_and_answer_ids_without_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    llm = LLM(str(tmp_path), load_format="dummy", num_gpu_blocks_override=20)
    output = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]
    assert len(output.token_ids) == 12
    assert output.text is None
    with pytest.raises(ValueError, match="prompt 0: a prompt needs a tokenizer"):
        llm.generate(["text"], GREEDY, use_tqdm=False)
