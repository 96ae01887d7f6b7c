"""What a checkpoint's config.json and generation_config.json say, checked and typed."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nanovllm.errors import ModelError
from nanovllm.sampling_params import SamplingParams

MAX_LAYERS = 4096
"""Refuses a nonsensical config before anything is sized by it; the deepest models have a few hundred."""

CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")

_REPR = reprlib.Repr()
_REPR.maxstring = 100  # a whole class name, but not a whole hostile file


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config:
    """The fields of a Qwen3 config.json that change the computation, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    """Dtype the checkpoint was saved in, one of CHECKPOINT_DTYPES."""
    eos_token_id: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint; a tied model has no `lm_head.weight` of its own."""
        hidden, head = self.hidden_size, self.head_dim
        query, key_value = self.num_attention_heads * head, self.num_key_value_heads * head
        layer = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, query),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "mlp.down_proj": (hidden, self.intermediate_size),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def parse_config(config: Mapping[str, object], origin: str = "config.json") -> Qwen3Config:
    """The typed form of a config.json, chosen by its `model_type` (or, without one, `architectures`).

    Keys that do not change the computation are not looked at. Raises ModelError, naming `origin`, the field
    and its value, for an unknown architecture, for a value that cannot be, and for a setting that this
    project does not compute or does not allow.
    """
    return _parser(config, origin)(_Fields(config, origin))


def eos_token_ids(
    config: Mapping[str, object], generation_config: Mapping[str, object], tokenizer_eos_id: int | None
) -> tuple[int, ...]:
    """Every id that ends a sequence: the union of both files and the tokenizer, ascending.

    Raises ModelError for an id that is no token of the model.
    """
    ids = set(_Fields(config, "config.json").token_ids("eos_token_id"))
    ids.update(_Fields(generation_config, "generation_config.json").token_ids("eos_token_id"))
    if tokenizer_eos_id is not None:
        ids.add(tokenizer_eos_id)
    vocab_size = _Fields(config, "config.json").integer("vocab_size")
    for token_id in ids:
        if token_id >= vocab_size:
            raise ModelError(
                f"eos_token_id={token_id} (of config.json, generation_config.json or the tokenizer): "
                f"must be below the model's vocab_size={vocab_size}"
            )
    return tuple(sorted(ids))


def default_sampling(generation_config: Mapping[str, object], origin: str = "generation_config.json") -> SamplingParams:
    """The sampling that the model's authors set; what the file leaves out or sets to null stays unset.

    `do_sample: false` is greedy, whatever else the file says. Raises ModelError, naming `origin`, for a value
    out of range.
    """
    do_sample = _Fields(generation_config, origin).optional_boolean("do_sample")
    if do_sample is False:
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p")
    values = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    try:
        return SamplingParams(**values)  # pyright: ignore[reportArgumentType]  (SamplingParams checks the types)
    except ValueError as error:
        raise ModelError(f"{origin}: {str(error).removeprefix('sampling.')}") from error


class _Fields:
    """Typed access to the fields of one JSON object; each method raises ModelError with field and value."""

    def __init__(self, values: Mapping[str, object], origin: str) -> None:
        self._values = values
        self._origin = origin

    def refused(self, name: str, value: object, because: str) -> ModelError:
        return ModelError(f"{self._origin}: {name}={_REPR.repr(value)}: {because}")

    def get(self, name: str) -> object:
        return self._values.get(name)

    def names(self) -> list[str]:
        return list(self._values)

    def integer(self, name: str, maximum: int = 2**31 - 1) -> int:
        value = self._required(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.refused(name, value, f"must be an integer from 1 to {maximum}")
        return value

    def positive(self, name: str) -> float:
        value = self._required(name)
        number = _finite(value)
        if number is None or number <= 0:
            raise self.refused(name, value, "must be a finite number above 0")
        return number

    def optional_boolean(self, name: str) -> bool | None:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refused(name, value, "must be true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids or null, as a tuple."""
        value = self.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        good = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
        if len(good) != len(ids):
            raise self.refused(name, value, "must be a token id or a list of token ids")
        return tuple(good)

    def _required(self, name: str) -> object:
        if self._values.get(name) is None:
            raise ModelError(f"{self._origin}: no {name}; it must be set")
        return self._values[name]


def _qwen3(fields: _Fields) -> Qwen3Config:
    _refuse_foreign_code(fields)
    _refuse_unsupported(fields)
    config = Qwen3Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", MAX_LAYERS),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        rms_norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.optional_boolean("tie_word_embeddings") or False,
        dtype=_dtype(fields),
        eos_token_id=fields.token_ids("eos_token_id"),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        because = f"must divide num_attention_heads={config.num_attention_heads}"
        raise fields.refused("num_key_value_heads", config.num_key_value_heads, because)
    if config.head_dim % 2:
        raise fields.refused("head_dim", config.head_dim, "must be even (rotary embedding turns pairs)")
    return config


PARSERS: dict[str, Callable[[_Fields], Qwen3Config]] = {"qwen3": _qwen3}
"""Supported models by `model_type`."""

ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3"}


def _parser(config: Mapping[str, object], origin: str) -> Callable[[_Fields], Qwen3Config]:
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    named = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    if model_type is None and named:
        model_type = ARCHITECTURES.get(named[0])
    known = isinstance(model_type, str) and model_type in PARSERS
    if not known or any(ARCHITECTURES.get(name) != model_type for name in named):
        raise ModelError(
            f"{origin}: model_type={_REPR.repr(config.get('model_type'))}, "
            f"architectures={_REPR.repr(config.get('architectures'))}: not a supported model; "
            f"supported: {', '.join(f'{kind} ({name})' for name, kind in ARCHITECTURES.items())}"
        )
    return PARSERS[str(model_type)]


def _refuse_foreign_code(fields: _Fields) -> None:
    """`auto_map` names Python files of the model's repository; `*_internal` keys have led other loaders to some."""
    for name in fields.names():
        if name == "auto_map" or name.endswith("_internal"):
            because = "needs code from the model's repository, which is never run; remove the field"
            raise fields.refused(name, fields.get(name), because)


def _refuse_unsupported(fields: _Fields) -> None:
    for name in ("attention_bias", "use_sliding_window"):
        if fields.optional_boolean(name):
            raise fields.refused(name, True, "not supported; must be false")
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.refused("hidden_act", fields.get("hidden_act"), "not supported; must be silu")
    if fields.get("quantization_config") is not None:
        because = "quantized checkpoints are not supported; use the unquantized one"
        raise fields.refused("quantization_config", fields.get("quantization_config"), because)
    layer_types = fields.get("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    ):
        raise fields.refused("layer_types", layer_types, "not supported; every layer must be full_attention")


def _rope_theta(fields: _Fields) -> float:
    """From `rope_theta` or, since transformers 5, `rope_parameters`; any scaling of positions is refused."""
    thetas: dict[str, float] = {}
    if fields.get("rope_theta") is not None:
        thetas["rope_theta"] = fields.positive("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        theta = _theta_of_default_rope(fields, name)
        if theta is not None:
            thetas[f"{name}.rope_theta"] = theta
    if not thetas:
        return fields.positive("rope_theta")  # raises: there is none
    if len(set(thetas.values())) > 1:
        raise fields.refused("rope_theta", thetas, "must be the same everywhere")
    return next(iter(thetas.values()))


def _theta_of_default_rope(fields: _Fields, name: str) -> float | None:
    rope = fields.get(name)
    if rope is None:
        return None
    if not isinstance(rope, dict):
        raise fields.refused(name, rope, "must be an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    plain = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1 or not plain.issuperset(rope):
        raise fields.refused(name, rope, "not supported; only rope_type default without scaling is")
    if rope.get("rope_theta") is None:
        return None
    theta = _finite(rope["rope_theta"])
    if theta is None or theta <= 0:
        raise fields.refused(f"{name}.rope_theta", rope["rope_theta"], "must be a finite number above 0")
    return theta


def _dtype(fields: _Fields) -> str:
    """From `dtype` or the older `torch_dtype`; float32, the format's own default, where neither is set."""
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return "float32"
    if value not in CHECKPOINT_DTYPES:
        raise fields.refused(name, value, f"must be one of {', '.join(CHECKPOINT_DTYPES)}")
    return str(value)


def _finite(value: object) -> float | None:
    """`value` as a float; None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
