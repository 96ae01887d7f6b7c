"""Why a row is refused: the codes, and the error that carries one."""

from enum import StrEnum
from typing import NoReturn

from nanovllm.errors import PromptError


class BadRowCode(StrEnum):
    """Why a row never reached the engine. The words are stable: scripts match them in failures.jsonl."""

    LINE_TOO_LONG = "line_too_long"
    """The line has more than MAX_LINE_BYTES bytes."""
    NOT_UTF8 = "not_utf8"
    """Bytes that are not UTF-8."""
    NOT_JSON = "not_json"
    """The line is not one JSON value."""
    BAD_NUMBER = "bad_number"
    """NaN, Infinity, or a number that is too large."""
    LONE_SURROGATE = "lone_surrogate"
    """A \\ud800-\\udfff escape that is not half of a pair: it stands for no character."""
    TOO_DEEP = "too_deep"
    """More than MAX_DEPTH lists and objects within one another."""
    BAD_VALUE = "bad_value"
    """A value of a Parquet record that cannot be read, such as a time after the year 9999."""
    NOT_OBJECT = "not_object"
    """JSON, but no object."""
    BAD_ID = "bad_id"
    """`id` is neither a string nor a 64-bit integer, or a Batch line's `custom_id` is not a string."""
    NO_PROMPT = "no_prompt"
    """None of the prompt forms."""
    SEVERAL_PROMPTS = "several_prompts"
    """More than one of the prompt forms."""
    BAD_PROMPT = "bad_prompt"
    """`prompt` is not a string."""
    BAD_MESSAGES = "bad_messages"
    """`messages` is not a list of {role, content} with a known role and a string for content."""
    BAD_TOOLS = "bad_tools"
    """`tools` is not a list of functions."""
    BAD_CHAT_OPTION = "bad_chat_option"
    """`chat_template_kwargs` or `continue_final_message` is of a wrong type, or cannot be followed."""
    OPTIONS_NEED_MESSAGES = "options_need_messages"
    """`tools`, `chat_template_kwargs` or `continue_final_message` beside a prompt that gets no chat template."""
    BAD_TOKEN_IDS = "bad_token_ids"
    """`prompt_token_ids` is not a list of integers from 0 to 2**31 - 1."""
    EMPTY_PROMPT = "empty_prompt"
    """An empty string or an empty list for a prompt."""
    BAD_COLUMN = "bad_column"
    """A column that reader.prompt names is missing, or is neither a string nor a number."""
    FIELD_TOO_LONG = "field_too_long"
    """A text, an id or a list that is longer than field_limits allows."""
    SYSTEM_NEEDS_MESSAGES = "system_needs_messages"
    """reader.system is set, but the row has no messages that it could lead."""
    BAD_BATCH_LINE = "bad_batch_line"
    """An OpenAI Batch line whose method, url or body is not one that can be answered."""
    NOT_BATCH_LINE = "not_batch_line"
    """writer.format=openai_batch, and the row is no OpenAI Batch line."""
    UNSUPPORTED_KEY = "unsupported_key"
    """A key in a Batch line's body that would change the answer and is not supported."""
    UNKNOWN_SAMPLING_KEY = "unknown_sampling_key"
    """`sampling` has a key that SamplingParams does not."""
    BAD_SAMPLING = "bad_sampling"
    """`sampling` is not an object, or a value in it is of a wrong type or out of range."""


def refuse(code: BadRowCode, reason: str) -> NoReturn:
    """Raises PromptError."""
    raise PromptError(code.value, reason)
