"""The configuration files and the dataclasses that they fill."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from jobs.command import CONF_DIR
from jobs.compose import ConfigSource, compose_config
from jobs.config import GenerateConfig, ReaderConfig, RecorderConfig, WriterConfig, to_llm_config
from nanovllm.config import LLMConfig, ModelConfig

SOURCE = ConfigSource(schema=GenerateConfig, config_dir=CONF_DIR, config_name="generate")
CHOICES = sorted(path.relative_to(CONF_DIR).with_suffix("") for path in CONF_DIR.glob("*/*.yaml"))
GLOBAL_GROUPS = ("experiment", "debug")
ALL_GROUPS = {"model", "parallel", "kv", "engine", "sampling", "reader", "writer", "recorder", *GLOBAL_GROUPS}


def compose(*overrides: str) -> GenerateConfig:
    return compose_config(SOURCE, overrides).config


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def default_of(key: str) -> Any:
    config: Any = GenerateConfig(model=ModelConfig(path="???"))
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_the_default_configuration_is_the_tiny_model_on_the_bundled_prompts():
    assert compose() == GenerateConfig(model=ModelConfig(path="tiny"))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_file_composes(choice: Path):
    assert isinstance(compose(f"{choice.parent}={choice.name}"), GenerateConfig)


def test_every_group_of_the_contract_has_a_file():
    assert {str(choice.parent) for choice in CHOICES} == ALL_GROUPS


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_no_file_restates_a_default(choice: Path):
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / f"{choice}.yaml"), resolve=False)
    content.pop("defaults", None)
    prefix = "" if choice.parts[0] in GLOBAL_GROUPS else f"{choice.parts[0]}."
    for key, value in leaves(content, prefix):
        assert value != default_of(key), f"conf/{choice}.yaml repeats the default of {key}"


def test_the_primary_file_sets_nothing_but_hydra():
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "generate.yaml"), resolve=False)
    assert set(content) == {"defaults", "hydra"}


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.parts[0] in GLOBAL_GROUPS], ids=str)
def test_an_experiment_begins_with_the_command_that_runs_it(choice: Path):
    lines = (CONF_DIR / f"{choice}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_", "Hydra wants its header first"
    assert lines[1].startswith("# python -m jobs.")
    assert f"{choice.parent}={choice.name}" in lines[1]


@pytest.mark.parametrize(("word", "enabled"), [("on", True), ("off", False)])
def test_recorder_on_and_off_are_words_not_yaml_booleans(word: str, enabled: bool):
    assert compose(f"recorder={word}").recorder.enabled is enabled


def test_the_named_models_have_their_paths():
    paths = {
        name: compose(f"model={name}").model.path for name in ("tiny", "qwen3", "qwen3_1_7b", "qwen3_4b", "qwen3_8b")
    }
    assert paths == {
        "tiny": "tiny",
        "qwen3": "Qwen/Qwen3-0.6B",
        "qwen3_1_7b": "Qwen/Qwen3-1.7B",
        "qwen3_4b": "Qwen/Qwen3-4B",
        "qwen3_8b": "Qwen/Qwen3-8B",
    }


def test_debug_wins_over_an_experiment_and_the_command_line_over_both():
    config = compose("experiment=prefix_sharing", "debug=quick", "reader.limit=2")
    assert (config.sampling.max_tokens, config.log_level, config.reader.limit) == (8, "DEBUG", 2)


def test_several_choices_of_one_group_add_up():
    config = compose("engine=[eager,low_latency]")
    assert (config.engine.enforce_eager, config.engine.max_num_seqs) == (True, 16)


def test_strings_keep_what_yaml_would_turn_into_something_else():
    config = compose("reader.system=no", "model.revision=1e3", 'reader.prompt="Translate: {text}"')
    assert (config.reader.system, config.reader.prompt) == ("no", "Translate: {text}")


@pytest.mark.parametrize("plus", ["", "+"])
def test_a_mapping_takes_any_name(plus: str):
    config = compose(f"{plus}reader.chat_template_kwargs.enable_thinking=false")
    assert config.reader.chat_template_kwargs == {"enable_thinking": False}
    config = compose("reader.chat_template_kwargs={style: [a, {b: 1}], n: 2}")
    assert config.reader.chat_template_kwargs == {"style": ["a", {"b": 1}], "n": 2}


def test_every_engine_setting_reaches_the_engine():
    config = compose("kv.block_size=32", "engine.max_num_seqs=7", "device=cpu", "seed=5", "model=qwen3")
    llm_config = to_llm_config(config)
    for field in fields(LLMConfig):
        assert getattr(llm_config, field.name) == getattr(config, field.name), field.name


def test_every_group_is_frozen():
    config = compose()
    groups = [getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name))]
    for value in (config, *groups):
        with pytest.raises(AttributeError):
            setattr(value, fields(value)[0].name, "changed")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GenerateConfig(input=" "), "input=' '"),
        (lambda: GenerateConfig(log_level="LOUD"), "log_level=LOUD: must be one of DEBUG, INFO, WARNING, ERROR"),
        (lambda: GenerateConfig(progress="maybe"), "progress=maybe: must be one of auto, on, off"),
        (lambda: GenerateConfig(seed=-1), "seed=-1: must be an integer from 0"),
        (lambda: GenerateConfig(device="tpu"), "device=tpu: must be one of auto, cpu, cuda"),
        (lambda: ReaderConfig(limit=0), "reader.limit=0: must be an integer of at least 1"),
        (lambda: ReaderConfig(max_failures=-1), "reader.max_failures=-1"),
        (lambda: ReaderConfig(prompt=""), "reader.prompt=''"),
        (lambda: WriterConfig(format="csv"), "writer.format=csv: must be one of jsonl, parquet"),
        (
            lambda: WriterConfig(format="openai_batch", keep=["a"]),
            "writer.keep=['a']: writer.format=openai_batch has no",
        ),
        (
            lambda: ReaderConfig(chat_template_kwargs={"tools": 1}),
            "reader.chat_template_kwargs={'tools': 1}: has tools",
        ),
        (
            lambda: GenerateConfig(reader=ReaderConfig(prompt="x"), writer=WriterConfig(format="openai_batch")),
            "writer.format=openai_batch: answers OpenAI Batch lines, which have no reader.prompt",
        ),
        (lambda: WriterConfig(keep=["a", ""]), "writer.keep="),
        (lambda: WriterConfig(keep=["a", "a"]), "must name each column once"),
        (lambda: RecorderConfig(flush_s=0.0), "recorder.flush_s=0.0: must be a number of seconds above 0"),
        (lambda: RecorderConfig(flush_s=float("nan")), "recorder.flush_s=nan"),
        (lambda: RecorderConfig(flush_s=float("inf")), "recorder.flush_s=inf"),
    ],
)
def test_a_value_out_of_range_names_key_value_and_range(build: Any, message: str):
    with pytest.raises(ValueError) as caught:
        build()
    assert message in str(caught.value)


@pytest.mark.parametrize("level", ["DEBUG", "info", "Warning", "eRRoR"])
def test_log_levels_are_taken_in_any_case(level: str):
    assert GenerateConfig(log_level=level).log_level == level


def test_importing_the_configuration_imports_no_heavy_library():
    program = (
        "import sys, jobs.config, jobs.launch\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CONF_DIR.parent
    )
    assert done.stdout.strip() == "[]"
