import pytest

from jobs.command_line import parse
from jobs.generate_job import COMMAND
from jobs.launch import _source
from jobs.text_values import as_text


@pytest.mark.parametrize(
    "value",
    [
        "Translate: {text}",
        'Say "{text}" twice',
        "back\\slash {a}",
        'quoted backslash \\" {a}',
        "ends in a backslash {a}\\",
        "{only}",
        "tabs\tand {a}",
    ],
)
def test_a_text_that_hydra_cannot_read_arrives_as_it_stands(value: str) -> None:
    from jobs.compose import compose_config

    line = parse([f"reader.prompt={value}"])
    composition = compose_config(_source(COMMAND, line), line.overrides)
    assert composition.config.reader.prompt == value
    assert line.words == [f"reader.prompt={value}"], "as it was typed, for the manifest"


@pytest.mark.parametrize(
    "word", ["input=part[0-3].jsonl", "input=a=b.jsonl", "input=日本.jsonl", "input={a}.jsonl", "+input=x(1).jsonl"]
)
def test_globs_and_odd_names(word: str) -> None:
    key, _, value = word.partition("=")
    assert as_text(word) == f'{key}="{value}"'


@pytest.mark.parametrize(
    "word",
    [
        "input=data/*.parquet",
        "input=a.jsonl,b.jsonl",
        "reader.prompt='Translate: {text}'",
        'reader.prompt="x"',
        "reader.prompt=null",
        "reader.prompt=",
        "kv.block_size=[",
        "sampling={a",
        "-m",
        "no equals {",
    ],
)
def test_what_hydra_reads_or_is_no_text_stays(word: str) -> None:
    assert as_text(word) == word
