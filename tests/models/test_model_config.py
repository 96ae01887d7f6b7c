import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.errors import ModelError
from nanovllm.models.model_config import default_sampling, eos_token_ids, parse_config
from nanovllm.sampling_params import SamplingParams
from tests.checkpoints import qwen3_config

SHIPPED = sorted((Path(__file__).parents[2] / "nanovllm" / "models" / "configs").glob("*/*/config.json"))

NUM_PARAMETERS = {"Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721, "Qwen3-4B": 4.022, "Qwen3-8B": 8.191}
"""Billions, as the model cards round them."""


def test_fields_are_read_under_their_own_names():
    parsed = parse_config(qwen3_config(torch_dtype="bfloat16", eos_token_id=[2, 0]))
    assert (parsed.hidden_size, parsed.num_key_value_heads, parsed.head_dim) == (32, 2, 16)
    assert (parsed.rope_theta, parsed.dtype, parsed.eos_token_id) == (10000.0, "bfloat16", (2, 0))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.parent.name)
def test_a_shipped_config_has_the_models_size(file):
    parsed = parse_config(json.loads(file.read_text()))
    elements = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in parsed.tensor_shapes().values())
    assert elements / 1e9 == pytest.approx(NUM_PARAMETERS[file.parent.name], abs=0.001)


def test_all_named_models_are_shipped():
    assert {file.parent.name for file in SHIPPED} == set(NUM_PARAMETERS)


def test_a_config_that_transformers_saves_today_is_read():
    from transformers import Qwen3Config

    saved = json.loads(
        Qwen3Config(
            vocab_size=320, head_dim=64, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}, dtype="float16"
        ).to_json_string()
    )
    parsed = parse_config(saved)
    assert (parsed.rope_theta, parsed.dtype, parsed.head_dim) == (5e5, "float16", 64)


def test_architectures_choose_the_model_without_a_model_type():
    assert parse_config(qwen3_config(model_type=None)) == parse_config(qwen3_config())


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": ["qwen3"]}, {"architectures": "x"}])
def test_an_unknown_architecture_is_refused_with_the_supported_ones(config):
    with pytest.raises(ModelError, match=r"qwen3 \(Qwen3ForCausalLM\)"):
        parse_config(config)


def test_another_head_on_a_known_model_type_is_refused():
    with pytest.raises(ModelError, match="Qwen3ForSequenceClassification"):
        parse_config(qwen3_config(architectures=["Qwen3ForSequenceClassification"]))


UNSUPPORTED = {
    "attention_bias": True,
    "use_sliding_window": True,
    "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
    "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    "_attn_implementation_internal": "owner/repo",
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"full_attention": {"rope_theta": 1e4}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_setting_that_is_not_computed_is_refused_by_name_and_file(name):
    with pytest.raises(ModelError, match=rf"^here/config.json: {name}="):
        parse_config(qwen3_config(**{name: UNSUPPORTED[name]}), "here/config.json")


IMPOSSIBLE = [
    ("vocab_size", 0),
    ("hidden_size", "32"),
    ("hidden_size", True),
    ("intermediate_size", 48.0),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", -4),
    ("num_key_value_heads", 3),
    ("head_dim", 15),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", 0),
    ("rope_theta", float("inf")),
    ("rope_theta", 10**400),
    ("rope_theta", [1e4]),
    ("max_position_embeddings", 2**31),
    ("tie_word_embeddings", "yes"),
    ("torch_dtype", "int8"),
    ("dtype", ["float32"]),
    ("eos_token_id", "2"),
    ("eos_token_id", [2, -1]),
    ("eos_token_id", True),
    ("rope_scaling", "linear"),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_a_value_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ModelError, match=rf"config.json: {name}="):
        parse_config(qwen3_config(**{name: value}))


@pytest.mark.parametrize("name", ["vocab_size", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"])
def test_a_missing_field_is_named(name):
    config = qwen3_config()
    del config[name]
    with pytest.raises(ModelError, match=f"no {name}"):
        parse_config(config)


def test_rope_theta_in_two_places_must_agree():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert parse_config(qwen3_config(rope_theta=1e6, **both)).rope_theta == 1e6
    with pytest.raises(ModelError, match="rope_theta"):
        parse_config(qwen3_config(rope_theta=1e4, **both))


def test_a_tied_model_has_no_head_of_its_own():
    tied = parse_config(qwen3_config(tie_word_embeddings=True)).tensor_shapes()
    untied = parse_config(qwen3_config(tie_word_embeddings=False)).tensor_shapes()
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert tied["model.layers.1.self_attn.k_proj.weight"] == (2 * 16, 32)


def test_b39_eos_is_the_union_of_config_generation_config_and_tokenizer():
    config = qwen3_config(eos_token_id=5)
    assert eos_token_ids(config, {"eos_token_id": [7, 5]}, 9) == (5, 7, 9)
    assert eos_token_ids(config, {}, None) == (5,)
    assert eos_token_ids(qwen3_config(eos_token_id=None), {"eos_token_id": None}, None) == ()


@pytest.mark.parametrize("bad", [-1, 320, 2**31, 2**63, 1.0, "2", [[2]]])
def test_b42_an_eos_that_is_no_token_is_refused(bad):
    with pytest.raises(ModelError, match="eos_token_id="):
        eos_token_ids(qwen3_config(), {"eos_token_id": bad}, None)


def test_default_sampling_is_what_the_file_sets_and_no_more():
    file = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "pad_token_id": 0}
    assert default_sampling(file) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert default_sampling({}) == SamplingParams()
    assert default_sampling({"do_sample": False, "temperature": 0.6}) == SamplingParams(temperature=0.0)


BAD_SAMPLING = [("temperature", -1), ("top_p", 0), ("top_k", 1.5), ("min_p", "a"), ("do_sample", 1)]


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING)
def test_default_sampling_out_of_range_names_file_and_field(name, value):
    with pytest.raises(ModelError, match=f"^here/generation_config.json: {name}="):
        default_sampling({name: value}, "here/generation_config.json")


def test_the_check_before_the_run_imports_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from nanovllm.models.checkpoint import check_checkpoint\n"
        "from nanovllm.models.source import resolve_model\n"
        "resolve_model('Qwen/Qwen3-8B', load_format='dummy') if sys.argv[1:] else None\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in ([], ["resolve"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=Path(__file__).parents[2])
