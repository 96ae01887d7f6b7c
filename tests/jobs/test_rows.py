import json
import random

import pytest

from jobs.field_limits import MAX_ID_CHARS, MAX_PROMPT_TOKENS, MAX_TEXT_CHARS
from jobs.json_line import MAX_LINE_BYTES
from jobs.prompt_forms import MAX_TOKEN_ID
from jobs.refusal import BadRowCode
from jobs.row_sampling import SAMPLING_KEYS
from jobs.rows import BadRow, InputRow, RowParser
from nanovllm.errors import PromptError
from nanovllm.sampling_params import SamplingParams
from tests.jobs.parsed import bad, good


def test_each_prompt_form_is_read() -> None:
    messages = [{"role": role, "content": "hi"} for role in ("system", "user", "assistant", "tool")]
    assert good({"prompt": "hi"}).prompt == "hi"
    assert good({"messages": messages}).messages == messages
    assert good({"prompt_token_ids": [0, 5, MAX_TOKEN_ID]}).prompt_token_ids == [0, 5, MAX_TOKEN_ID]
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}}
    assert good(chat).messages == messages
    for row in (good({"prompt": "hi"}), good({"messages": messages}), good({"prompt_token_ids": [1]}), good(chat)):
        assert sum(form is not None for form in (row.prompt, row.messages, row.prompt_token_ids)) == 1


def test_a_row_knows_where_it_came_from() -> None:
    row = good({"prompt": "hi"})
    assert (row.file, row.line, row.row, row.id, row.sampling, row.columns) == ("in.jsonl", 7, 3, 3, None, {})


@pytest.mark.parametrize("given", ["a", "", "Ä\u2028\x00😀", 0, -1, 2**63 - 1, -(2**63)])
def test_an_id_is_kept_as_given(given: str | int) -> None:
    row = good({"prompt": "hi", "id": given})
    assert row.id == given
    assert type(row.id) is type(given)


def test_null_counts_as_absent() -> None:
    row = good({"id": None, "prompt": "hi", "messages": None, "sampling": None, "custom_id": None, "body": None})
    assert (row.id, row.prompt, row.sampling) == (3, "hi", None)
    assert good({"messages": [{"role": "user", "content": "hi", "name": None}]}).messages


def test_the_last_of_duplicate_keys_wins() -> None:
    assert good('{"prompt": "first", "prompt": "last"}').prompt == "last"


def test_sampling_becomes_params() -> None:
    row = good({"prompt": "hi", "sampling": {"temperature": 0, "stop": "x", "top_k": None, "seed": 1}})
    assert row.sampling == SamplingParams(temperature=0, stop=["x"], seed=1)
    row = good({"prompt": "hi", "sampling": {"stop": ["x", "y"], "stop_token_ids": [1]}})
    assert row.sampling == SamplingParams(stop=["x", "y"], stop_token_ids=[1])


def test_batch_body_becomes_prompt_and_sampling() -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5, "stop": "x"}
    row = good({"custom_id": "c-1", "id": 9, "body": body | {"n": 1, "stream": False, "logprobs": None, "top_p": 0.5}})
    assert row.id == "c-1"
    assert row.sampling == SamplingParams(max_tokens=5, stop=["x"], top_p=0.5)
    assert good({"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "hi"}}).prompt == "hi"
    assert good({"custom_id": "c", "body": {"prompt": [1, 2]}}).prompt_token_ids == [1, 2]
    equal = {"prompt": "hi", "max_tokens": 5, "max_completion_tokens": 5}
    assert good({"custom_id": "c", "body": equal}).sampling == SamplingParams(max_tokens=5)


def test_what_goes_to_the_template_with_the_messages_is_kept() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    messages = [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is"},
    ]
    options = {"tools": [TOOL], "chat_template_kwargs": {"thinking": False}, "continue_final_message": True}
    body = good({"custom_id": "c", "body": {"messages": messages, "user": "u", "tool_choice": "auto", **options}})
    for row in (good({"messages": messages, **options}), body):
        assert row.chat is not None
        without_null = {key: value for key, value in messages[1].items() if value is not None}
        assert row.chat.messages == [messages[0], without_null, *messages[2:]]
        assert (row.chat.tools, row.chat.template_kwargs) == ([TOOL], {"thinking": False})
        assert row.chat.continue_final_message
    assert (body.url, row.sampling) == ("/v1/chat/completions", SamplingParams())


def test_the_jobs_template_variables_are_overridden_key_by_key() -> None:
    job = {"thinking": True, "style": "short"}
    row = good(CHAT | {"chat_template_kwargs": {"thinking": False}}, chat_template_kwargs=job)
    assert row.chat is not None
    assert row.chat.template_kwargs == {"thinking": False, "style": "short"}
    with pytest.raises(ValueError, match=r"reader\.chat_template_kwargs has tools"):
        RowParser(chat_template_kwargs={"tools": []})


def test_batch_only_refuses_every_other_form() -> None:
    assert good({"custom_id": "c", "body": COMPLETION}, batch_only=True).url == "/v1/completions"
    row = bad({"prompt": "hi", "id": "a"}, batch_only=True)
    assert (row.code, row.id) == ("not_batch_line", "a")
    assert "the row has prompt" in row.reason


def test_custom_id_and_body_alone_are_plain_columns() -> None:
    assert good({"prompt": "hi", "body": "text"}, keep=["body"]).columns == {"body": "text"}
    assert good({"prompt": "hi", "custom_id": "x"}).id == 3


def test_a_content_in_parts_is_their_texts_line_by_line() -> None:
    """Nulls, which records of Parquet have for every key of any other part, count as absent."""
    given = [
        {"type": "text", "text": "a\n"},
        {"type": "text", "text": "", "image_url": None},
        {"text": "b", "type": "text"},
    ]
    for role in ("system", "user", "assistant", "tool"):
        row = good({"messages": [{"role": role, "content": given}, {"role": "user", "content": given[:1]}]})
        assert row.messages == [{"role": role, "content": "a\n\n\nb"}, {"role": "user", "content": "a\n"}]
    body = {"messages": [{"role": "user", "content": given}]}
    assert good({"custom_id": "c", "body": body}).messages == [{"role": "user", "content": "a\n\n\nb"}]
    going_on = {"messages": [{"role": "assistant", "content": given}], "continue_final_message": True}
    assert good(going_on).messages == [{"role": "assistant", "content": "a\n\n\nb"}]


def test_kept_columns_come_in_the_order_of_keep() -> None:
    row = good({"a": [1, {"b": 2.5}], "prompt": "hi", "z": 1}, keep=["z", "missing", "a", "prompt"])
    assert list(row.columns.items()) == [("z", 1), ("missing", None), ("a", [1, {"b": 2.5}]), ("prompt", "hi")]


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT_PART = {"type": "text", "text": "hi"}


def parts(*content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(content)}]}


COMPLETION = {"prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAN_LIKE = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000)
BAD_ROWS: list[tuple[bytes | str | dict, str, str]] = [
    (b'{"prompt": "\xff"}', "not_utf8", "byte 13 of the line, 0xff"),
    (b'{"prompt": "\xed\xa0\x80"}', "not_utf8", "0xed"),
    (b"\xff\xfe{\x00", "not_utf8", "byte 1 of"),
    ('{"prompt": "hi"', "not_json", 'the line begins "{'),
    ('{"prompt": "hi"} x', "not_json", "trailing"),
    ("{'prompt': 'hi'}", "not_json", "malformed"),
    ('{"prompt": "a\tb"}', "not_json", "malformed"),
    ('{"prompt": 01}', "not_json", "malformed"),
    *((f'{{"prompt": "hi", "x": {number}}}', "bad_number", "") for number in NAN_LIKE),
    *((f'{{"prompt": "hi", "sampling": {{"seed": {number}}}}}', "bad_number", "") for number in NAN_LIKE),
    (r'{"prompt": "\ud800"}', "lone_surrogate", "half"),
    (r'{"prompt": "a\udc00b"}', "lone_surrogate", "half"),
    (r'{"prompt": "hi", "unused": ["\ud83d and more text"]}', "lone_surrogate", "half"),
    (r'{"prompt": "hi", "\udc00\ud800": 1}', "lone_surrogate", "half"),
    ('{"x":' * 100_000, "too_deep", "100 lists"),
    ('{"prompt": "hi", "x": ' + "[" * 100 + "]" * 100 + "}", "too_deep", "100 lists"),
    (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', "line_too_long", "16,777,216 bytes"),
    ("[1, 2]", "not_object", "the line is a list"),
    ('"text"', "not_object", 'the string "text"'),
    ("5", "not_object", "the number 5"),
    ("null", "not_object", "the line is null, must be an object"),
    ({"prompt": "hi", "id": 1.5}, "bad_id", "id is the number 1.5"),
    ({"prompt": "hi", "id": True}, "bad_id", "id is a boolean"),
    ({"prompt": "hi", "id": [1]}, "bad_id", "id is a list"),
    ({"prompt": "hi", "id": 2**63}, "bad_id", "64 bits"),
    ({"custom_id": 5, "body": COMPLETION}, "bad_id", "custom_id is the number 5"),
    ({"text": "hi"}, "no_prompt", "none of prompt, messages, prompt_token_ids"),
    ({}, "no_prompt", "none of"),
    ({"prompt": None}, "no_prompt", "none of"),
    ({"custom_id": "c"}, "no_prompt", "only custom_id"),
    ({"body": COMPLETION}, "no_prompt", "only body"),
    ({"prompt": "hi", "prompt_token_ids": [1]}, "several_prompts", "prompt and prompt_token_ids"),
    ({"prompt": "hi", "custom_id": "c", "body": COMPLETION}, "several_prompts", "prompt and body"),
    ({"prompt": 5}, "bad_prompt", "prompt is the number 5"),
    ({"prompt": ["hi"]}, "bad_prompt", "prompt is a list"),
    ({"prompt": False}, "bad_prompt", "prompt is a boolean"),
    ({"prompt": ""}, "empty_prompt", "prompt is an empty string"),
    ({"messages": []}, "empty_prompt", "messages is an empty list"),
    ({"prompt_token_ids": []}, "empty_prompt", "prompt_token_ids is an empty list"),
    ({"messages": "hi"}, "bad_messages", 'messages is the string "hi"'),
    ({"messages": ["hi"]}, "bad_messages", "messages[0] is the string"),
    ({"messages": [{"role": "user"}]}, "bad_messages", "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "bad_messages", "messages[0].content is null, must be"),
    ({"messages": [None]}, "bad_messages", "messages[0] is null, must be"),
    ({"messages": [{"content": "hi"}]}, "bad_messages", "messages[0].role is null"),
    (
        {"messages": [CHAT["messages"][0], {"role": "robot", "content": ""}]},
        "bad_messages",
        'messages[1].role is "robot"',
    ),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "bad_messages", "must be one of system, user"),
    ({"messages": [{"role": "user", "content": {}}]}, "bad_messages", "messages[0].content is an object"),
    ({"messages": [{"role": "user", "content": []}]}, "bad_messages", "content is an empty list"),
    (parts("hi"), "bad_messages", "messages[0].content[0] is the string"),
    (parts({"text": "hi"}), "bad_messages", "content[0].type is null; only text is supported"),
    (
        parts(TEXT_PART, {"type": "image_url", "image_url": {"url": "x"}}),
        "bad_messages",
        '[1].type is "image_url"; only',
    ),
    (parts({"type": ["text"], "text": "hi"}), "bad_messages", "content[0].type is"),
    (parts({"type": "text"}), "bad_messages", "content[0].text is null, must be a string"),
    (parts({"type": "text", "text": 1}), "bad_messages", "content[0].text is the number 1"),
    (parts({**TEXT_PART, "weight": 1}), "bad_messages", 'content[0] has key "weight"; a part is'),
    ({"messages": [{"role": "user", "content": "hi", "weight": 1}]}, "bad_messages", 'key "weight"; supported are'),
    ({"messages": [{"role": "user", "content": "hi", "name": 1}]}, "bad_messages", "name is the number 1"),
    ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, "bad_messages", "only an assistant calls"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "bad_messages", "tool_calls is a list, must be"),
    ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "bad_messages", "must be a list of objects"),
    (CHAT | {"tools": {}}, "bad_tools", "tools is an object, must be a list"),
    (CHAT | {"tools": [{"name": "f"}]}, "bad_tools", "tools[0] is {'name': 'f'}, must be"),
    (CHAT | {"tools": [{"function": {"name": 5}}]}, "bad_tools", "tools[0]"),
    (CHAT | {"tools": [TOOL] * 1025}, "field_too_long", "tools has 1,025 entries; at most 1,024"),
    (CHAT | {"chat_template_kwargs": [1]}, "bad_chat_option", "chat_template_kwargs is a list"),
    (CHAT | {"chat_template_kwargs": {"messages": []}}, "bad_chat_option", "has messages, which no variable"),
    (CHAT | {"continue_final_message": 1}, "bad_chat_option", "is the number 1, must be true or false"),
    (
        {"messages": [{"role": "assistant", "content": ""}], "continue_final_message": True},
        "bad_chat_option",
        "no content to go on with",
    ),
    (COMPLETION | {"tools": [TOOL]}, "options_need_messages", "tools goes to a chat template, but the row has prompt"),
    ({"prompt_token_ids": [1], "continue_final_message": True}, "options_need_messages", "prompt_token_ids"),
    ({"custom_id": "c", "body": COMPLETION | {"chat_template_kwargs": {}}}, "options_need_messages", "messages"),
    ({"prompt": "x" * (MAX_TEXT_CHARS + 1)}, "field_too_long", "prompt has 1,048,577 characters; at most 1,048,576"),
    ({"messages": [{"role": "user", "content": "x" * (MAX_TEXT_CHARS + 1)}]}, "field_too_long", "messages[0].content"),
    (parts(*[{"type": "text", "text": "x" * (MAX_TEXT_CHARS // 2)}] * 2), "field_too_long", "messages[0].content"),
    ({"prompt_token_ids": [1] * (MAX_PROMPT_TOKENS + 1)}, "field_too_long", "prompt_token_ids has 1,048,577 entries"),
    ({"prompt": "hi", "id": "x" * (MAX_ID_CHARS + 1)}, "field_too_long", "id has 4,097 characters"),
    ({"custom_id": "x" * (MAX_ID_CHARS + 1), "body": COMPLETION}, "field_too_long", "custom_id has 4,097"),
    ({"prompt": "hi", "sampling": {"stop": ["x"] * 257}}, "field_too_long", "sampling.stop has 257 entries"),
    ({"prompt": "hi", "sampling": {"stop": "x" * 4097}}, "field_too_long", "sampling.stop has 4,097 characters"),
    ({"prompt": "hi", "sampling": {"stop_token_ids": [1] * 4097}}, "field_too_long", "4,097 entries"),
    ({"prompt_token_ids": "1"}, "bad_token_ids", "must be a list of integers"),
    ({"prompt_token_ids": [1, "2"]}, "bad_token_ids", 'prompt_token_ids[1] is "2"'),
    ({"prompt_token_ids": [1, 2.0]}, "bad_token_ids", "prompt_token_ids[1] is 2.0"),
    ({"prompt_token_ids": [True]}, "bad_token_ids", "is true"),
    ({"prompt_token_ids": [None]}, "bad_token_ids", "is null"),
    ({"prompt_token_ids": [1, -1]}, "bad_token_ids", "prompt_token_ids[1] is -1, must be an integer from 0"),
    ({"prompt_token_ids": [2**31]}, "bad_token_ids", "2147483648"),
    ({"prompt_token_ids": [2**63]}, "bad_token_ids", "must be an integer"),
    ({"prompt": "hi", "sampling": [1]}, "bad_sampling", "sampling is a list"),
    ({"prompt": "hi", "sampling": {"temprature": 1}}, "unknown_sampling_key", 'no key "temprature"; its keys are temp'),
    ({"prompt": "hi", "sampling": {"temperature": -1}}, "bad_sampling", "sampling.temperature=-1: must be"),
    ({"prompt": "hi", "sampling": {"temperature": "1"}}, "bad_sampling", "sampling.temperature='1'"),
    ({"prompt": "hi", "sampling": {"temperature": 10**400}}, "bad_sampling", ""),
    ({"prompt": "hi", "sampling": {"top_p": 0}}, "bad_sampling", "sampling.top_p=0"),
    ({"prompt": "hi", "sampling": {"top_k": 2**31}}, "bad_sampling", "sampling.top_k=2147483648"),
    ({"prompt": "hi", "sampling": {"max_tokens": 0}}, "bad_sampling", "sampling.max_tokens=0"),
    ({"prompt": "hi", "sampling": {"max_tokens": "5"}}, "bad_sampling", "sampling.max_tokens='5': must be an integer"),
    ({"prompt": "hi", "sampling": {"max_tokens": 2**63}}, "bad_sampling", "sampling.max_tokens="),
    ({"prompt": "hi", "sampling": {"stop": ""}}, "bad_sampling", "sampling.stop=''"),
    ({"prompt": "hi", "sampling": {"stop": ["x"] * 10_000 + [1]}}, "bad_sampling", "sampling.stop=['x'"),
    (
        {"prompt": "hi", "sampling": {"stop_token_ids": [-1]}},
        "bad_sampling",
        "stop_token_ids=[-1]: must be",
    ),
    (
        {"prompt": "hi", "sampling": {"stop_token_ids": [2**31]}},
        "bad_sampling",
        "stop_token_ids=[2147483648]: must be",
    ),
    ({"prompt": "hi", "sampling": {"seed": 1.0}}, "bad_sampling", "sampling.seed=1.0"),
    ({"custom_id": "c", "method": "GET", "body": CHAT}, "bad_batch_line", 'method is "GET"'),
    ({"custom_id": "c", "url": "/v1/embeddings", "body": CHAT}, "bad_batch_line", "/v1/embeddings"),
    ({"custom_id": "c", "url": ["/v1"], "body": CHAT}, "bad_batch_line", "url is ['/v1']"),
    ({"custom_id": "c", "body": "hi"}, "bad_batch_line", "body is the string"),
    ({"custom_id": "c", "body": {}}, "bad_batch_line", "neither messages nor prompt"),
    ({"custom_id": "c", "body": CHAT | COMPLETION}, "bad_batch_line", "messages and prompt"),
    ({"custom_id": "c", "url": "/v1/completions", "body": CHAT}, "bad_batch_line", "it must have prompt, which /v1/"),
    ({"custom_id": "c", "body": CHAT, "sampling": {}}, "bad_batch_line", "sampling stands beside body"),
    ({"custom_id": "c", "body": CHAT | {"max_tokens": 1, "max_completion_tokens": 2}}, "bad_batch_line", "differ"),
    ({"custom_id": "c", "body": CHAT | {"n": 2}}, "unsupported_key", 'body has key "n"; supported are'),
    ({"custom_id": "c", "body": CHAT | {"stream": True}}, "unsupported_key", '"stream"'),
    ({"custom_id": "c", "body": CHAT | {"tool_choice": "required"}}, "unsupported_key", '"tool_choice"'),
    ({"custom_id": "c", "body": CHAT, "tools": []}, "bad_batch_line", "tools stands beside body"),
    ({"custom_id": "c", "body": CHAT | {"top_p": 2}}, "bad_sampling", "sampling.top_p=2"),
    ({"custom_id": "c", "body": {"prompt": ["a", "b"]}}, "bad_token_ids", 'body.prompt[0] is "a", must be'),
    ({"custom_id": "c", "body": {"prompt": []}}, "empty_prompt", "body.prompt is an empty list"),
    ({"custom_id": "c", "body": {"prompt": ""}}, "empty_prompt", "empty string"),
]


@pytest.mark.parametrize(("line", "code", "fragment"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_says_what_is_wrong(line: bytes | str | dict, code: str, fragment: str) -> None:
    row = bad(line)
    assert row.code == code, row
    assert fragment in row.reason, row
    assert len(row.reason) <= 400
    assert (row.file, row.line, row.row) == ("in.jsonl", 7, 3)
    json.dumps(row.reason, ensure_ascii=False).encode("utf-8")


def test_every_code_that_a_line_can_have_is_in_the_table() -> None:
    other_settings = {BadRowCode.BAD_COLUMN, BadRowCode.SYSTEM_NEEDS_MESSAGES, BadRowCode.NOT_BATCH_LINE}
    parquet_only = {BadRowCode.BAD_VALUE}
    assert {code for _, code, _ in BAD_ROWS} == set(BadRowCode) - other_settings - parquet_only


def test_a_line_of_the_greatest_length_and_depth_is_good() -> None:
    assert good('{"prompt": "hi", "x": ' + "[" * 99 + "]" * 99 + "}")
    assert good({"messages": [{"role": "user", "content": "{[" * 200}] * 200}, keep=[])
    head, tail = b'{"prompt": "hi", "column": "', b'"}'
    assert good(head + b"x" * (MAX_LINE_BYTES - len(head) - len(tail)) + tail)
    assert good({"prompt": "x" * MAX_TEXT_CHARS, "id": "x" * MAX_ID_CHARS})
    assert good({"prompt_token_ids": [1] * MAX_PROMPT_TOKENS, "sampling": {"stop": ["x" * 4096] * 256}})
    assert good(CHAT | {"tools": [TOOL] * 1024})


def test_a_bad_row_carries_its_id_where_that_could_be_read() -> None:
    assert bad({"id": "a", "prompt": ""}).id == "a"
    assert bad({"prompt": ""}).id == 3
    assert bad({"custom_id": "c", "body": {}}).id == "c"
    assert bad({"id": 1.5, "prompt": "hi"}).id is None
    assert bad("{").id is None


def test_a_row_that_the_engine_refuses_becomes_a_bad_row() -> None:
    row = good({"id": "a", "prompt": "hi"}).failed(PromptError("too_long", "4,097 tokens"))
    assert row == BadRow(file="in.jsonl", line=7, row=3, id="a", code="too_long", reason="4,097 tokens")


def test_any_line_gives_a_row_or_a_bad_row() -> None:
    rng = random.Random(0)
    seeds = [line for line in (_as_bytes(line) for line, _, _ in BAD_ROWS) if len(line) < 2000]
    seeds += [_as_bytes({"id": 1, "prompt": "Grüße 😀", "sampling": dict.fromkeys(SAMPLING_KEYS)})]
    pieces = [b"NaN", b"\\ud800", b'"', b"{", b"[", b"}", b"\xff", b"null", b"-1", b"1e999", b":", b",", b"\x00", b"0"]
    parsers = [
        RowParser(keep=["x", "prompt"]),
        RowParser(prompt="{prompt} {x}", keep=["id", "body"]),
        RowParser(system="Be brief."),
    ]
    rows = []
    for number in range(6000):
        row = parsers[number % 3].from_line("f", number + 1, number, _mutated(rng, rng.choice(seeds), pieces))
        assert isinstance(row, InputRow | BadRow)
        if isinstance(row, BadRow):
            assert row.code in set(BadRowCode)
            json.dumps([row.id, row.reason], ensure_ascii=False, allow_nan=False).encode("utf-8")
        rows.append(row.row)
    assert rows == list(range(6000))


def _as_bytes(line: bytes | str | dict) -> bytes:
    if isinstance(line, dict):
        line = json.dumps(line)
    return line.encode() if isinstance(line, str) else line


def _mutated(rng: random.Random, line: bytes, pieces: list[bytes]) -> bytes:
    for _ in range(rng.randint(0, 3)):
        begin = rng.randint(0, len(line))
        end = min(len(line), begin + rng.choice([0, 1, 5]))
        line = line[:begin] + rng.choice([b"", rng.choice(pieces), line[begin:end] * 2]) + line[end:]
    return line
