"""One line of JSONL as an object, or what is wrong with it."""

import json
from typing import NoReturn, cast

import msgspec

from jobs.json_words import kind, shown
from jobs.refusal import BadRowCode, refuse
from nanovllm.errors import PromptError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is a bad row; the rest of it is read past, never held."""
MAX_DEPTH = 100
"""Lists and objects within one another in one line."""

_EXAMPLE = '{"prompt": "..."}'
_TOO_DEEP = f"more than {MAX_DEPTH} lists and objects within one another"


def decode_object(data: bytes) -> dict[str, object]:
    """The object of one line, its strings without lone surrogates; raises PromptError, whatever the bytes are."""
    if len(data) > MAX_LINE_BYTES:
        refuse(BadRowCode.LINE_TOO_LONG, f"the line has more than {MAX_LINE_BYTES:,} bytes")
    try:
        record = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _decoding_refusal(data, error) from None
    if not isinstance(record, dict):
        refuse(BadRowCode.NOT_OBJECT, f"the line is {kind(record)}, must be an object such as {_EXAMPLE}")
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deeper(record, MAX_DEPTH):
        refuse(BadRowCode.TOO_DEEP, _TOO_DEEP)
    return record


def _decoding_refusal(data: bytes, error: Exception) -> PromptError:
    """Finds out slowly, and only for a line that could not be decoded, what is wrong with it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as fault:
        return PromptError(
            BadRowCode.NOT_UTF8.value, f"byte {fault.start + 1} of the line, 0x{data[fault.start]:02x}, is not UTF-8"
        )
    if isinstance(error, RecursionError):
        return PromptError(BadRowCode.TOO_DEEP.value, _TOO_DEEP)
    if isinstance(error, msgspec.ValidationError):
        return PromptError(BadRowCode.BAD_NUMBER.value, "a number that is too large")
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except PromptError as refusal:
        return refusal
    except RecursionError:
        return PromptError(BadRowCode.TOO_DEEP.value, _TOO_DEEP)
    except ValueError:
        beginning = shown(text.strip())
        return PromptError(BadRowCode.NOT_JSON.value, f"{error}; the line begins {beginning}")
    return PromptError(
        BadRowCode.LONE_SURROGATE.value, f"a \\ud800-\\udfff escape without its other half stands for no text; {error}"
    )


def _refuse_constant(name: str) -> NoReturn:
    refuse(BadRowCode.BAD_NUMBER, f"{name} is not JSON; null leaves a value out")


def _is_deeper(value: object, limit: int) -> bool:
    """Whether lists and objects stand more than `limit` deep within one another."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else cast(list[object], parent))
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
