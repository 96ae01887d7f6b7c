"""Small random Qwen3 checkpoints in the real format, for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm.models.model_config import parse_config

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = ("The quick brown fox jumps over the lazy dog. ", "She sells sea shells by the sea shore, 1234567890. ") * 4


def qwen3_config(**overrides: object) -> dict[str, object]:
    """A config.json of a small Qwen3; `overrides` replace fields, and a field given as None is left out."""
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    return {key: value for key, value in (config | overrides).items() if value is not None}


def random_tensors(config: dict[str, object], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor that the config calls for, in its dtype: norms near 1, the rest normal with std 0.2.

    The large std makes logits differ clearly, so that a wrong weight cannot hide.
    """
    parsed = parse_config(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parsed.tensor_shapes().items():
        values = torch.randn(shape, generator=generator) * 0.2
        tensors[name] = (values + 1.0 if len(shape) == 1 else values).to(getattr(torch, parsed.dtype))
    return tensors


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """model.safetensors, or `num_shards` files and their index, tensors dealt out in turn."""
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        names = list(tensors)[shard::num_shards]
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE, vocab_size: int = 300) -> None:
    """A byte-level BPE that can write any text, with SPECIAL_TOKENS as ids 0, 1, 2 and <think> as an added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)


def write_checkpoint(
    directory: Path,
    *,
    num_shards: int = 1,
    head: torch.Tensor | None = None,
    tokenizer: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    generation_config: dict[str, object] | None = None,
    seed: int = 0,
    **config_overrides: object,
) -> dict[str, torch.Tensor]:
    """Write a whole checkpoint and return its tensors; `head` adds (or replaces) `lm_head.weight`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = qwen3_config(**config_overrides)
    (directory / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    tensors = random_tensors(config, seed)
    if head is not None:
        tensors["lm_head.weight"] = head
    write_weights(directory, tensors, num_shards)
    if tokenizer:
        write_tokenizer(directory, chat_template)
    return tensors
