"""One input row: what a line or a record must be, and what is wrong with it when it is not."""

import json
import math
import reprlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import NoReturn, cast

import msgspec

from nanovllm.errors import PromptError
from nanovllm.sampling_params import SamplingParams

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is a bad row; the rest of it is read past, never held."""
MAX_DEPTH = 100
"""Lists and objects within one another in one line."""
MAX_TOKEN_ID = 2**31 - 1
ROLES = ("system", "user", "assistant", "tool")
PROMPT_FORMS = ("prompt", "messages", "prompt_token_ids")
"""The columns that each make a row's prompt; an OpenAI Batch line is the fourth form."""
BATCH_KEYS = ("custom_id", "method", "url", "body")
"""What makes an OpenAI Batch line: `custom_id` and `body`; `method` and `url` are checked where they are given."""
BATCH_FORMS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
"""The `url` of a Batch line, and the key that its body then has."""
SAMPLING_KEYS = tuple(f.name for f in fields(SamplingParams))

_ID_RANGE = range(-(2**63), 2**63)
_MAX_REASON = 400


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
    BAD_TOKEN_IDS = "bad_token_ids"
    """`prompt_token_ids` is not a list of integers from 0 to 2**31 - 1."""
    EMPTY_PROMPT = "empty_prompt"
    """An empty string or an empty list for a prompt."""
    BAD_COLUMN = "bad_column"
    """A column that reader.prompt names is missing, or is neither a string nor a number."""
    SYSTEM_NEEDS_MESSAGES = "system_needs_messages"
    """reader.system is set, but the row has no messages that it could lead."""
    BAD_BATCH_LINE = "bad_batch_line"
    """An OpenAI Batch line whose method, url or body is not one that can be answered."""
    UNSUPPORTED_KEY = "unsupported_key"
    """A key in a Batch line's body that would change the answer and is not supported."""
    UNKNOWN_SAMPLING_KEY = "unknown_sampling_key"
    """`sampling` has a key that SamplingParams does not."""
    BAD_SAMPLING = "bad_sampling"
    """`sampling` is not an object, or a value in it is of a wrong type or out of range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be answered: one line of failures.jsonl."""

    file: str
    line: int
    """1-based; in a Parquet file, the number of the record."""
    row: int
    id: str | int | None
    """None where the row's own id could not be read; the row number where it has none."""
    code: str
    """A BadRowCode, or the code of a PromptError when the engine refused the row."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """A row that is well-formed. Exactly one of prompt, messages and prompt_token_ids is not None, and not empty."""

    file: str
    line: int
    """1-based; in a Parquet file, the number of the record."""
    row: int
    """Ordinal over all files, bad rows included."""
    id: str | int
    """As given; the row number where none is."""
    prompt: str | None = None
    """Text that gets no chat template."""
    messages: list[dict[str, str]] | None = None
    """{role, content} each, for the model's chat template; reader.system is already in front."""
    prompt_token_ids: list[int] | None = None
    """Within [0, 2**31); whether the model has them is for the engine to say."""
    sampling: SamplingParams | None = None
    """The row's own; None where it has none."""
    columns: dict[str, object] = field(default_factory=dict)
    """The columns that writer.keep names, in its order; None where the row has no such column."""

    def failed(self, error: PromptError) -> BadRow:
        """This row as the failure that came up later, on its way into the engine or in it."""
        return BadRow(
            file=self.file, line=self.line, row=self.row, id=self.id, code=str(error.code), reason=error.reason
        )


class PromptTemplate:
    """reader.prompt: a column's name, or a text with {column} in it; {{ and }} are plain braces.

    Raises ValueError for a template that is none.
    """

    def __init__(self, text: str) -> None:
        self._parts = _template_parts(text)
        self.columns = tuple(column for _, column in self._parts if column is not None)

    def fill(self, record: Mapping[str, object]) -> str:
        """The prompt of one record; raises PromptError where a column is missing or no string and no number."""
        return "".join(
            literal if column is None else literal + _column_text(record, column) for literal, column in self._parts
        )


class RowParser:
    """Turns lines and records into rows by the reader.* settings. Has no state, so threads may share one.

    - With `prompt` (see PromptTemplate) it alone makes the prompt; `messages`, `body` and so on are plain columns then.
    - `system` goes in front of a row's messages unless they already hold a system message. A prompt without messages
      has no place for it, so such a row is a bad one rather than silently answered without; `system` together with
      `prompt` could never apply and is a ValueError.
    - A null counts as absent, everywhere. The last of duplicate keys in an object wins, as in Python's own json.
    - An `id` is the row's own; a Batch line has its custom_id for one, and `id` is a plain column there.
    """

    def __init__(self, *, prompt: str | None = None, system: str | None = None, keep: Sequence[str] = ()) -> None:
        for key, text in (("reader.prompt", prompt), ("reader.system", system)):
            if text is not None:
                _check_setting(key, text)
        if prompt is not None and system is not None:
            raise ValueError(
                f"reader.system={_shown(system)}: reader.prompt makes plain prompts, which have no system message; "
                "put the text into the reader.prompt template, or use rows with messages"
            )
        self.template = None if prompt is None else PromptTemplate(prompt)
        self._system = None if system is None else {"role": "system", "content": system}
        self._keep = tuple(keep)
        self._decoder = msgspec.json.Decoder()

    def columns(self) -> frozenset[str]:
        """Every column that a row is made from; a reader of columnar files needs no others."""
        made_from = (*PROMPT_FORMS, *BATCH_KEYS) if self.template is None else self.template.columns
        return frozenset((*made_from, "id", "sampling", *self._keep))

    def from_line(self, file: str, line: int, row: int, data: bytes) -> InputRow | BadRow:
        """The row of one line of JSONL, never an exception, whatever the bytes are."""
        try:
            record = self._decode(data)
        except PromptError as error:
            return BadRow(file=file, line=line, row=row, id=None, code=error.code, reason=error.reason)
        return self.from_record(file, line, row, record)

    def from_record(self, file: str, line: int, row: int, record: dict[str, object]) -> InputRow | BadRow:
        """The row of one decoded record; its strings must hold no lone surrogates, as decoded UTF-8 never does."""
        row_id: str | int | None = None
        try:
            is_batch = self._is_batch_line(record)
            row_id = _row_id(record, is_batch, row)
            prompt, messages, token_ids, sampling = self._content(record, is_batch)
            return InputRow(
                file=file,
                line=line,
                row=row,
                id=row_id,
                prompt=prompt,
                messages=messages,
                prompt_token_ids=token_ids,
                sampling=sampling,
                columns={name: record.get(name) for name in self._keep},
            )
        except PromptError as error:
            return BadRow(file=file, line=line, row=row, id=row_id, code=error.code, reason=_limited(error.reason))

    def _decode(self, data: bytes) -> dict[str, object]:
        if len(data) > MAX_LINE_BYTES:
            _refuse(BadRowCode.LINE_TOO_LONG, f"the line has more than {MAX_LINE_BYTES:,} bytes")
        try:
            record = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _decoding_refusal(data, error) from None
        if not isinstance(record, dict):
            _refuse(BadRowCode.NOT_OBJECT, f"the line is {_kind(record)}, must be an object such as {_EXAMPLE}")
        if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deeper(record, MAX_DEPTH):
            _refuse(BadRowCode.TOO_DEEP, _TOO_DEEP)
        return record

    def _is_batch_line(self, record: Mapping[str, object]) -> bool:
        return self.template is None and record.get("custom_id") is not None and record.get("body") is not None

    def _content(
        self, record: Mapping[str, object], is_batch: bool
    ) -> tuple[str | None, list[dict[str, str]] | None, list[int] | None, SamplingParams | None]:
        """(prompt, messages, token ids, sampling), one of the first three not None."""
        if self.template is not None:
            return _prompt(self.template.fill(record)), None, None, _sampling(record.get("sampling"))
        form = _prompt_form(record, is_batch)
        if is_batch:
            form, record = _batch_request(record)
        value = record[form]
        sampling = _sampling(record.get("sampling"))
        if form == "messages":
            return None, self._with_system(_messages(value)), None, sampling
        if self._system is not None:
            _refuse(
                BadRowCode.SYSTEM_NEEDS_MESSAGES,
                f"reader.system is set, but the row has {form}, which takes no system message; it needs messages",
            )
        if form == "prompt_token_ids":
            return None, None, _token_ids(value), sampling
        return _prompt(value), None, None, sampling

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if self._system is None or any(message["role"] == "system" for message in messages):
            return messages
        return [self._system, *messages]


_EXAMPLE = '{"prompt": "..."}'
_TOO_DEEP = f"more than {MAX_DEPTH} lists and objects within one another"


def _refuse(code: BadRowCode, reason: str) -> NoReturn:
    raise PromptError(code.value, reason)


# Settings


def _check_setting(key: str, text: str) -> None:
    if not text:
        raise ValueError(f"{key}='': must not be empty; null leaves it out")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{key}={text!a}: must be UTF-8 text")


def _template_parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, column after it or None) pairs."""
    if "{" not in text and "}" not in text:
        return (("", text),)
    wanted = "use {column} for a column and {{ or }} for a brace"
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"reader.prompt={_shown(text)}: {error}; {wanted}") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion or set(name) & set(".[]{}")):
            raise ValueError(f"reader.prompt={_shown(text)}: a field must be the name of a column alone; {wanted}")
    if all(name is None for _, name, _, _ in parsed):
        raise ValueError(f"reader.prompt={_shown(text)}: names no column, so all prompts were the same; {wanted}")
    return tuple((literal, name) for literal, name, _, _ in parsed)


# Prompts


def _column_text(record: Mapping[str, object], column: str) -> str:
    value = record.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        _refuse(BadRowCode.BAD_COLUMN, f"reader.prompt needs column {_shown(column)}, which the row does not have")
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(
            BadRowCode.BAD_COLUMN,
            f"column {_shown(column)} is {_kind(value)}; reader.prompt needs a string or a number",
        )
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(BadRowCode.BAD_NUMBER, f"column {_shown(column)} is {value}; reader.prompt needs a finite number")
    return str(value)


def _prompt_form(record: Mapping[str, object], is_batch: bool) -> str:
    """The only prompt form that the row has; `body` for a Batch line."""
    found = [name for name in PROMPT_FORMS if record.get(name) is not None]
    if is_batch:
        found.append("body")
    if len(found) > 1:
        _refuse(BadRowCode.SEVERAL_PROMPTS, f"the row has {' and '.join(found)}; it must have only one of them")
    if not found:
        halves = [name for name in ("custom_id", "body") if record.get(name) is not None]
        hint = f"; an OpenAI Batch line needs custom_id and body, here is only {halves[0]}" if halves else ""
        _refuse(BadRowCode.NO_PROMPT, f"the row has none of {', '.join(PROMPT_FORMS)}{hint}")
    return found[0]


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        _refuse(BadRowCode.BAD_PROMPT, f"prompt is {_kind(value)}, must be a string")
    if not value:
        _refuse(BadRowCode.EMPTY_PROMPT, "prompt is an empty string")
    return value


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list):
        _refuse(BadRowCode.BAD_MESSAGES, f"messages is {_kind(value)}, must be a list of {{role, content}}")
    if not value:
        _refuse(BadRowCode.EMPTY_PROMPT, "messages is an empty list")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        _refuse(BadRowCode.BAD_MESSAGES, f"messages[{index}] is {_kind(message)}, must be {{role, content}}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        _refuse(BadRowCode.BAD_MESSAGES, f"messages[{index}].role is {_shown(role)}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        _refuse(BadRowCode.BAD_MESSAGES, f"messages[{index}].content is {_kind(content)}, must be a string")
    for key, extra in message.items():
        if extra is not None and key not in ("role", "content"):
            _refuse(
                BadRowCode.BAD_MESSAGES, f"messages[{index}] has key {_shown(key)}; only role and content are supported"
            )
    return {"role": role, "content": content}


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list):
        _refuse(BadRowCode.BAD_TOKEN_IDS, f"prompt_token_ids is {_kind(value)}, must be a list of integers")
    if not value:
        _refuse(BadRowCode.EMPTY_PROMPT, "prompt_token_ids is an empty list")
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID:
        index, wrong = _first_wrong_token_id(value)
        _refuse(
            BadRowCode.BAD_TOKEN_IDS,
            f"prompt_token_ids[{index}] is {_shown(wrong)}, must be an integer from 0 to {MAX_TOKEN_ID}",
        )
    return value


def _first_wrong_token_id(ids: list[object]) -> tuple[int, object]:
    return next((i, t) for i, t in enumerate(ids) if type(t) is not int or not 0 <= t <= MAX_TOKEN_ID)


# Ids, Batch lines, sampling


def _row_id(record: Mapping[str, object], is_batch: bool, row: int) -> str | int:
    if is_batch:
        custom_id = record["custom_id"]
        if not isinstance(custom_id, str):
            _refuse(BadRowCode.BAD_ID, f"custom_id is {_kind(custom_id)}, must be a string")
        return custom_id
    value = record.get("id")
    if value is None:
        return row
    if isinstance(value, bool) or not isinstance(value, str | int):
        _refuse(BadRowCode.BAD_ID, f"id is {_kind(value)}, must be a string or an integer")
    if isinstance(value, int) and value not in _ID_RANGE:
        _refuse(BadRowCode.BAD_ID, f"id is {_shown(value)}, must fit into 64 bits; write it as a string")
    return value


def _batch_request(record: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """An OpenAI Batch line as (prompt form, the row that it amounts to)."""
    method, url, body = record.get("method"), record.get("url"), record["body"]
    if method not in (None, "POST"):
        _refuse(BadRowCode.BAD_BATCH_LINE, f"method is {_shown(method)}, must be POST")
    if not (url is None or (isinstance(url, str) and url in BATCH_FORMS)):
        _refuse(BadRowCode.BAD_BATCH_LINE, f"url is {_shown(url)}, must be one of {', '.join(BATCH_FORMS)}")
    if not isinstance(body, dict):
        _refuse(BadRowCode.BAD_BATCH_LINE, f"body is {_kind(body)}, must be an object")
    if record.get("sampling") is not None:
        _refuse(BadRowCode.BAD_BATCH_LINE, "sampling stands beside body; the keys of a Batch line go into its body")
    given = {key: value for key, value in body.items() if value is not None and key != "model"}
    prompt_forms = [form for form in BATCH_FORMS.values() if form in given]
    if len(prompt_forms) != 1 or (url is not None and BATCH_FORMS[cast(str, url)] != prompt_forms[0]):
        wanted = "either messages or prompt" if url is None else f"{BATCH_FORMS[cast(str, url)]}, which {url} takes"
        found = " and ".join(prompt_forms) or "neither messages nor prompt"
        _refuse(BadRowCode.BAD_BATCH_LINE, f"body has {found}; it must have {wanted}")
    value = given.pop(prompt_forms[0])
    form = "prompt_token_ids" if prompt_forms[0] == "prompt" and isinstance(value, list) else prompt_forms[0]
    return form, {form: value, "sampling": _batch_sampling(given)}


def _batch_sampling(given: dict[str, object]) -> dict[str, object]:
    """The sampling keys of a body, under this project's names."""
    if "max_completion_tokens" in given:
        wanted = given.pop("max_completion_tokens")
        if given.setdefault("max_tokens", wanted) != wanted:
            _refuse(BadRowCode.BAD_BATCH_LINE, "body has max_tokens and max_completion_tokens that differ")
    for key in given:
        if key not in SAMPLING_KEYS:
            supported = ", ".join(("model", "messages", "prompt", "max_completion_tokens", *SAMPLING_KEYS))
            _refuse(BadRowCode.UNSUPPORTED_KEY, f"body has key {_shown(key)}; supported are {supported}")
    return given


def _sampling(value: object) -> SamplingParams | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        _refuse(BadRowCode.BAD_SAMPLING, f"sampling is {_kind(value)}, must be an object")
    for key in value:
        if key not in SAMPLING_KEYS:
            _refuse(
                BadRowCode.UNKNOWN_SAMPLING_KEY,
                f"sampling has no key {_shown(key)}; its keys are {', '.join(SAMPLING_KEYS)}",
            )
    try:
        sampling = SamplingParams(**value)
    except (ValueError, OverflowError) as error:  # OverflowError: an integer that no float holds
        _refuse(BadRowCode.BAD_SAMPLING, str(error))
    _check_sampling_sizes(sampling)
    return sampling


def _check_sampling_sizes(sampling: SamplingParams) -> None:
    """The engine keeps these numbers in 32 bits."""
    for name in ("top_k", "max_tokens"):
        number = getattr(sampling, name)
        if number is not None and number > MAX_TOKEN_ID:
            _refuse(BadRowCode.BAD_SAMPLING, f"sampling.{name}={_shown(number)}: must be at most {MAX_TOKEN_ID}")
    for token_id in sampling.stop_token_ids or ():
        if not 0 <= token_id <= MAX_TOKEN_ID:
            _refuse(
                BadRowCode.BAD_SAMPLING,
                f"sampling.stop_token_ids holds {_shown(token_id)}: must be from 0 to {MAX_TOKEN_ID}",
            )


# What a line is instead of JSON


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
        beginning = _shown(text.strip())
        return PromptError(BadRowCode.NOT_JSON.value, f"{error}; the line begins {beginning}")
    return PromptError(
        BadRowCode.LONE_SURROGATE.value, f"a \\ud800-\\udfff escape without its other half stands for no text; {error}"
    )


def _refuse_constant(name: str) -> NoReturn:
    _refuse(BadRowCode.BAD_NUMBER, f"{name} is not JSON; null leaves a value out")


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


# Words for values


def _kind(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return f"the number {_shown(value)}"
    if isinstance(value, str):
        return f"the string {_shown(value)}"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _shown(value: object, limit: int = 60) -> str:
    """The value as in JSON, shortened to about `limit` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        shown = json.dumps(value[:limit], ensure_ascii=False)
        return shown if len(value) <= limit else f'{shown[:-1]}..."'
    short = reprlib.Repr()
    short.maxother = short.maxlong = limit
    return short.repr(value)


def _limited(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."
