"""What engine.kernels and engine.attention mean on this device and for this model."""

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch

from nanovllm.config import ATTENTION, KERNELS, EngineConfig
from nanovllm.errors import SettingError
from nanovllm.kernel_choice import KernelChoice, choose_kernels
from nanovllm.layers.attention_backends import ReferenceAttention, TritonAttention
from nanovllm.models.model_config import parse_config
from tests.checkpoints import qwen3_config

CONFIG = parse_config(qwen3_config())
AUTO = EngineConfig()
TRITON = EngineConfig(kernels="triton", attention="triton")
FLASH_ATTN = EngineConfig(attention="flash_attn")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def choose(
    engine: EngineConfig = AUTO,
    *,
    device: torch.device = CPU,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
) -> KernelChoice:
    return choose_kernels(engine, replace(CONFIG, head_dim=head_dim), dtype, block_size, device)


def asking(key: str, word: str) -> EngineConfig:
    """That alone, and auto for the other."""
    return EngineConfig(kernels=word) if key == "kernels" else EngineConfig(attention=word)


def set_interpret(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    set_interpret(monkeypatch, "1")


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """As if there were one of that compute capability: nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


@pytest.mark.parametrize("interpret", [None, "0", "1"])
def test_auto_on_a_cpu_is_the_reference_with_an_interpreter_or_without(
    monkeypatch: pytest.MonkeyPatch, interpret: str | None
) -> None:
    set_interpret(monkeypatch, interpret)
    choice = choose()
    assert (choice.kernels, choice.attention) == ("reference", "reference")
    assert choice.kernels_reason == choice.attention_reason == "auto: the only implementation on cpu"
    assert not choice.capturable


@pytest.mark.parametrize("key", ["kernels", "attention"])
@pytest.mark.parametrize("interpret", [None, "", "0"])
def test_triton_on_a_cpu_is_refused_with_key_value_and_cure(
    monkeypatch: pytest.MonkeyPatch, interpret: str | None, key: str
) -> None:
    set_interpret(monkeypatch, interpret)
    with pytest.raises(SettingError) as refusal:
        choose(asking(key, "triton"))
    assert str(refusal.value) == (
        f"engine.{key}=triton: Triton's kernels need a CUDA device; use engine.{key}=reference"
    )
    assert getattr(choose(asking(key, "reference")), key) == "reference", "the cure is none"


@pytest.mark.usefixtures("interpreted")
def test_in_the_interpreter_triton_runs_where_it_is_asked_for() -> None:
    choice = choose(TRITON)
    assert (choice.kernels_reason, choice.attention_reason) == ("asked for", "asked for")
    assert choose(asking("kernels", "triton")).attention == choose(asking("attention", "triton")).kernels == "reference"


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("attention", ["triton", "reference"])
@pytest.mark.usefixtures("interpreted")
def test_a_step_with_any_reference_in_it_is_no_graph(kernels: str, attention: str) -> None:
    choice = choose(EngineConfig(kernels=kernels, attention=attention))
    assert (choice.kernels, choice.attention) == (kernels, attention)
    assert choice.capturable == (kernels == attention == "triton")


@pytest.mark.parametrize(
    ("word", "ops", "backend"),
    [("triton", "kernels.triton_ops", TritonAttention), ("reference", "kernels.reference", ReferenceAttention)],
)
def test_a_choice_brings_its_own_implementation(word: str, ops: str, backend: type) -> None:
    """TRITON_INTERPRET stays as conftest.py sets it: a kernel remembers what it was when it was imported."""
    choice = KernelChoice(kernels=word, kernels_reason="", attention=word, attention_reason="")
    assert choice.ops() is importlib.import_module(ops)
    assert type(choice.backend()) is backend


@pytest.mark.parametrize("head_dim", [1, 8, 15, 17, 24, 48, 80, 96, 192, 255, 512])
@pytest.mark.parametrize("key", ["kernels", "attention"])
@pytest.mark.usefixtures("interpreted")
def test_a_head_size_that_triton_cannot_do_is_refused(key: str, head_dim: int) -> None:
    with pytest.raises(SettingError) as refusal:
        choose(asking(key, "triton"), head_dim=head_dim)
    message = f"engine.{key}=triton: head_dim={head_dim} is no power of two from 16 to 256; use engine.{key}=reference"
    assert str(refusal.value) == message
    assert choose(head_dim=head_dim).kernels == "reference"


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.usefixtures("interpreted")
def test_a_head_size_that_is_a_power_of_two_is_taken(head_dim: int) -> None:
    assert choose(TRITON, head_dim=head_dim).attention == "triton"


@pytest.mark.usefixtures("interpreted")
def test_triton_is_refused_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    message = "engine.kernels=triton: the package triton is not installed; use engine.kernels=reference"
    with pytest.raises(SettingError, match=message):
        choose(asking("kernels", "triton"))
    assert choose().kernels == "reference"


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_flash_attn_is_refused_on_a_cpu(kernels: str) -> None:
    message = "engine.attention=flash_attn: needs a CUDA device; use engine.attention=auto"
    with pytest.raises(SettingError, match=message):
        choose(EngineConfig(kernels=kernels, attention="flash_attn"), block_size=256)


def test_auto_on_a_gpu_is_triton_where_it_runs_and_else_the_reference_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_interpret(monkeypatch, None)
    for capability, head_dim, chosen, reason in (
        ((9, 0), 128, "triton", "auto: measured fastest"),
        ((8, 0), 128, "triton", "auto: measured fastest"),
        ((7, 5), 128, "reference", "auto: Some GPU is older than compute capability 8.0"),
        ((9, 0), 80, "reference", "auto: head_dim=80 is no power of two from 16 to 256"),
    ):
        on_gpu(monkeypatch, capability)
        choice = choose(device=CUDA, head_dim=head_dim)
        assert (choice.kernels, choice.attention) == (chosen, chosen)
        assert choice.kernels_reason == choice.attention_reason == reason
        assert choice.capturable == (chosen == "triton")
        assert choice.obstacle == (None if chosen == "triton" else reason.removeprefix("auto: "))


@pytest.mark.parametrize(
    ("block_size", "dtype", "said"),
    [
        (16, torch.bfloat16, ["kv.block_size=16", "multiple of 256", "set kv.block_size=256"]),
        (300, torch.float16, ["kv.block_size=300", "multiple of 256", "use engine.attention=triton"]),
        (256, torch.float32, ["model.dtype must be bfloat16 or float16", "not float32"]),
    ],
)
def test_flash_attn_says_what_it_cannot_run_before_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, block_size: int, dtype: torch.dtype, said: list[str]
) -> None:
    on_gpu(monkeypatch, (9, 0))
    with pytest.raises(SettingError, match=r"^engine\.attention=flash_attn: ") as refusal:
        choose(FLASH_ATTN, device=CUDA, block_size=block_size, dtype=dtype)
    assert all(part in str(refusal.value) for part in said), refusal.value


@pytest.mark.parametrize("word", ["", "Triton", "cuda", "flash", "none", None, True, 1])
@pytest.mark.parametrize(("key", "choices"), [("kernels", KERNELS), ("attention", ATTENTION)])
def test_an_unknown_word_is_refused_with_the_choices(key: str, choices: tuple[str, ...], word: object) -> None:
    with pytest.raises(ValueError) as refusal:
        EngineConfig(**{key: word})  # pyright: ignore[reportArgumentType]
    assert str(refusal.value) == f"engine.{key}={word}: must be one of {', '.join(choices)}"


def test_flash_attn_is_a_choice_of_attention_alone() -> None:
    with pytest.raises(ValueError, match=r"^engine\.kernels=flash_attn: must be one of auto, triton, reference$"):
        EngineConfig(kernels="flash_attn")
