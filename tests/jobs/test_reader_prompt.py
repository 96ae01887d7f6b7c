"""Prompts that reader.prompt makes of columns, and the messages that reader.system adds."""

import pytest

from jobs.rows import BadRow, RowParser
from nanovllm.sampling_params import SamplingParams
from tests.jobs.parsed import bad, good

COMPLETION = {"prompt": "hi"}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("text", "Hello"),
        ("{text}", "Hello"),
        ("Translate: {text}", "Translate: Hello"),
        ("{{{text}}} {n} {x} {text}.", "{Hello} 3 0.5 Hello."),
        ("{ä b}", "ü"),
    ],
)
def test_a_prompt_is_made_from_columns(template: str, prompt: str) -> None:
    record = {"text": "Hello", "n": 3, "x": 0.5, "ä b": "ü", "prompt": "ignored", "messages": "a column like others"}
    row = good(record | {"id": "a", "sampling": {"seed": 1}}, prompt=template)
    assert (row.prompt, row.messages, row.id, row.sampling) == (prompt, None, "a", SamplingParams(seed=1))


@pytest.mark.parametrize(
    ("value", "code", "fragment"),
    [
        ({}, "bad_column", 'column "text", which the row does not have'),
        ({"text": None}, "bad_column", "does not have"),
        ({"text": True}, "bad_column", "is a boolean; reader.prompt needs a string or a number"),
        ({"text": ["x"]}, "bad_column", "is a list"),
        ({"text": ""}, "empty_prompt", "empty string"),
    ],
)
def test_a_prompt_cannot_be_made_from_every_column(value: dict, code: str, fragment: str) -> None:
    row = bad(value, prompt="{text}")
    assert row.code == code
    assert fragment in row.reason


def test_a_nan_in_a_column_makes_no_prompt() -> None:
    row = RowParser(prompt="x").from_record("in.parquet", 1, 0, {"x": float("nan")})
    assert isinstance(row, BadRow)
    assert row.code == "bad_number"


@pytest.mark.parametrize(
    "template", ["", "{", "}", "a {", "{}", "{0.x}", "{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{{a}}", "{a:{b}}", "\udcff"]
)
def test_what_is_no_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"reader\.prompt="):
        RowParser(prompt=template)


def test_a_system_message_is_put_in_front_unless_there_is_one() -> None:
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}
    assert good({"messages": [user]}, system="Be brief.").messages == [{"role": "system", "content": "Be brief."}, user]
    assert good({"messages": [system, user]}, system="Be brief.").messages == [system, user]
    batch = good({"custom_id": "c", "body": {"messages": [user]}}, system="Be brief.").messages
    assert batch == [{"role": "system", "content": "Be brief."}, user]


def test_a_system_message_for_a_plain_prompt_is_a_bad_row_and_with_a_template_an_error() -> None:
    for record in ({"prompt": "hi"}, {"prompt_token_ids": [1]}, {"custom_id": "c", "body": COMPLETION}):
        assert bad(record, system="Be brief.").code == "system_needs_messages"
    with pytest.raises(ValueError, match=r"reader\.system=\"Be brief\.\": reader\.prompt makes plain prompts"):
        RowParser(prompt="text", system="Be brief.")
    with pytest.raises(ValueError, match=r"reader\.system=''"):
        RowParser(system="")
