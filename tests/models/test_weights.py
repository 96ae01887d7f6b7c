import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm.errors import ModelError
from nanovllm.models.model_config import Qwen3Config, parse_config
from nanovllm.models.source import ModelSource, resolve_model
from nanovllm.models.weights import load_dummy, load_weights
from tests.checkpoints import qwen3_config, random_tensors, write_checkpoint

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def node(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def norm(size: int) -> nn.Module:
    return nn.RMSNorm(size)


class Skeleton(nn.Module):
    """The parameter tree of a Qwen3 without its arithmetic."""

    fused = {  # noqa: RUF012
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, c: Qwen3Config) -> None:
        super().__init__()
        layers = nn.ModuleList(self.layer(c) for _ in range(c.num_hidden_layers))
        self.model = node(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size), layers=layers, norm=norm(c.hidden_size)
        )
        self.lm_head = linear(c.vocab_size, c.hidden_size)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def layer(c: Qwen3Config) -> nn.Module:
        query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return node(
            self_attn=node(
                qkv_proj=linear(query + 2 * key_value, c.hidden_size),
                o_proj=linear(c.hidden_size, query),
                q_norm=norm(c.head_dim),
                k_norm=norm(c.head_dim),
            ),
            mlp=node(
                gate_up_proj=linear(2 * c.intermediate_size, c.hidden_size),
                down_proj=linear(c.hidden_size, c.intermediate_size),
            ),
            input_layernorm=norm(c.hidden_size),
            post_attention_layernorm=norm(c.hidden_size),
        )


def load(directory, dtype=torch.float32, device="meta") -> Skeleton:
    """Load the checkpoint of `directory` into a skeleton built on `device`."""
    source = resolve_model(str(directory))
    with torch.device(device):
        model = Skeleton(parse_config(source.config))
    load_weights(model, source, dtype, "cpu")
    return model


def assert_holds(model: Skeleton, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Every parameter of the model equals its tensors, in order, cast to dtype."""
    for name, parameter in model.named_parameters():
        parts = [name]
        for fused, names in model.fused.items():
            if f".{fused}." in name:
                parts = [name.replace(fused, part) for part in names]
        expected = torch.cat([tensors[part] for part in parts]).to(dtype)
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_its_tensors(tmp_path, num_shards, device, dtype):
    tensors = write_checkpoint(tmp_path, num_shards=num_shards, num_attention_heads=4, num_key_value_heads=1)
    assert_holds(load(tmp_path, dtype, device), tensors, dtype)


def test_a_parameter_that_is_already_in_place_keeps_its_memory(tmp_path):
    write_checkpoint(tmp_path)
    source = resolve_model(str(tmp_path))
    model = Skeleton(parse_config(source.config))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_weights(model, source, torch.float32, "cpu")
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_b63_tied_without_a_head_shares_the_embedding(tmp_path, device):
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path, torch.bfloat16, device)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_holds(model, tensors, torch.bfloat16)


def test_b63_tied_with_the_embedding_as_its_head_is_fine(tmp_path):
    embedding = random_tensors(qwen3_config())[EMBEDDING]
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=True, head=embedding.clone(), num_shards=2)
    assert_holds(load(tmp_path), tensors, torch.float32)


def test_b63_tied_with_another_head_is_refused(tmp_path):
    head = random_tensors(qwen3_config())[EMBEDDING].clone()
    head[-1, -1] += 1e-6
    write_checkpoint(tmp_path, tie_word_embeddings=True, head=head)
    with pytest.raises(ModelError, match=r"model.safetensors: tensor 'lm_head.weight' differs from"):
        load(tmp_path)


def test_b63_untied_with_a_head_uses_it(tmp_path):
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=False)
    model = load(tmp_path)
    assert_holds(model, tensors, torch.float32)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_b63_untied_without_a_head_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=False)
    del tensors[HEAD]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor 'lm_head.weight' in model.safetensors"):
        load(tmp_path)


def missing(tensors):
    del tensors[K_PROJ]


def extra(tensors):
    tensors["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(32)


def one_layer_more(tensors):
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(32)


def transposed(tensors):
    tensors[K_PROJ] = torch.zeros(32, 32 + 1)


def rows_moved_between_fused_parts(tensors):
    for name, rows in (("q_proj", 63), ("k_proj", 33)):
        tensors[f"model.layers.1.self_attn.{name}.weight"] = torch.zeros(rows, 32)


def scalar(tensors):
    tensors[K_PROJ] = torch.tensor(1.0)


def integers(tensors):
    tensors[K_PROJ] = tensors[K_PROJ].to(torch.int8)


def not_a_number(tensors):
    tensors[K_PROJ][3, 4] = torch.nan


def infinite(tensors):
    tensors[NORM][0] = -torch.inf


DAMAGES = {
    missing: f"no tensor '{K_PROJ}'",
    extra: "k_proj.bias' is none of this model's",
    one_layer_more: "'model.layers.2.input_layernorm.weight' is none of this model's",
    transposed: rf"'{K_PROJ}' has the shape \[32, 33\]; config.json calls for \[32, 32\]",
    rows_moved_between_fused_parts: r"has the shape \[..?, 32\]; config.json calls for",
    scalar: rf"'{K_PROJ}' has the shape \[\]",
    integers: f"'{K_PROJ}' has the dtype 'I8'",
    not_a_number: f"'{K_PROJ}' is not finite in torch.float32",
    infinite: f"'{NORM}' is not finite",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_b64_a_damaged_checkpoint_is_refused_naming_tensor_and_file(tmp_path, damage):
    tensors = write_checkpoint(tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=DAMAGES[damage]) as caught:
        load(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_b64_a_missing_shard_is_refused_naming_it(tmp_path):
    write_checkpoint(tmp_path, num_shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00003-of-00003.safetensors: the file is missing"):
        load(tmp_path)


def test_b64_a_truncated_shard_is_refused_naming_it(tmp_path):
    write_checkpoint(tmp_path, num_shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors: .*truncated"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused_naming_both(tmp_path):
    tensors = write_checkpoint(tmp_path, num_shards=2)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    held = load_file(second)
    name = next(iter(load_file(first)))
    save_file(held | {name: tensors[name]}, second)
    with pytest.raises(ModelError, match=f"'{name}' is in two files, {first.name} and {second.name}"):
        load(tmp_path)


def test_b65_a_weight_too_large_for_float16_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path)
    tensors[NORM][0] = 70_000.0
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, torch.bfloat16)
    with pytest.raises(ModelError, match=f"'{NORM}' is not finite in torch.float16.*model.dtype too narrow"):
        load(tmp_path, torch.float16)


def test_a_source_with_dummy_weights_has_none_to_load(tmp_path):
    write_checkpoint(tmp_path)
    source = resolve_model(str(tmp_path), load_format="dummy")
    with pytest.raises(ModelError, match="no weights to load"):
        load_weights(Skeleton(parse_config(source.config)), source, torch.float32, "cpu")


def test_a_model_that_is_not_its_config_is_our_bug(tmp_path):
    write_checkpoint(tmp_path)
    source: ModelSource = resolve_model(str(tmp_path))
    other = Skeleton(parse_config(qwen3_config(num_hidden_layers=1)))
    with pytest.raises(AssertionError, match=r"the model and config.json differ"):
        load_weights(other, source, torch.float32, "cpu")


def test_buffers_on_the_meta_device_are_our_bug(tmp_path):
    write_checkpoint(tmp_path)
    source = resolve_model(str(tmp_path))
    model = Skeleton(parse_config(source.config))
    model.register_buffer("rotary", torch.empty(4, device="meta"))
    with pytest.raises(AssertionError, match="rotary"):
        load_weights(model, source, torch.float32, "cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_dummy_weights_are_reproducible_and_tame(tied):
    config = parse_config(qwen3_config(tie_word_embeddings=tied, hidden_size=128))
    with torch.device("meta"):
        models = [Skeleton(config) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        load_dummy(model, seed, torch.bfloat16, "cpu")
    same, again, other = ([*model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[0], other[0])
    assert (models[0].lm_head.weight is models[0].model.embed_tokens.weight) == tied
    for name, parameter in models[0].named_parameters():
        expected = 0.0 if "norm" in name else 0.02
        assert parameter.float().std().item() == pytest.approx(expected, rel=0.1), name
    assert torch.equal(models[0].model.norm.weight, torch.ones(128, dtype=torch.bfloat16))


def test_the_checkpoint_helper_writes_what_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = write_checkpoint(tmp_path, num_shards=2, tie_word_embeddings=False)
    model, report = AutoModelForCausalLM.from_pretrained(str(tmp_path), local_files_only=True, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.state_dict()[K_PROJ], tensors[K_PROJ])
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
