"""A line in the form of the OpenAI Batch API, as the row that it amounts to."""

from collections.abc import Mapping
from typing import cast

from jobs.batch_output import CHAT_URL, COMPLETION_URL
from jobs.chat_forms import CHAT_OPTIONS
from jobs.field_limits import MAX_ID_CHARS, check_length
from jobs.json_words import kind, shown
from jobs.refusal import BadRowCode, refuse
from jobs.row_sampling import SAMPLING_KEYS

BATCH_KEYS = ("custom_id", "method", "url", "body")
"""What makes an OpenAI Batch line: `custom_id` and `body`; `method` and `url` are checked where they are given."""
BATCH_FORMS = {CHAT_URL: "messages", COMPLETION_URL: "prompt"}
"""The `url` of a Batch line, and the key that its body then has."""

NEUTRAL = {
    "tool_choice": "auto",
    "n": 1,
    "stream": False,
    "logprobs": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
}
"""Keys of a body that change nothing at these values."""

IGNORED = ("model", "user", "metadata", "store")
"""Keys of a body that change no answer, whatever they hold."""


def is_batch_line(record: Mapping[str, object]) -> bool:
    """Whether a record is meant as one; what is wrong with it then is for batch_id and batch_request to say."""
    return record.get("custom_id") is not None and record.get("body") is not None


def batch_id(record: Mapping[str, object]) -> str:
    """The custom_id; raises PromptError unless it is a string."""
    custom_id = record["custom_id"]
    if not isinstance(custom_id, str):
        refuse(BadRowCode.BAD_ID, f"custom_id is {kind(custom_id)}, must be a string")
    check_length("custom_id", custom_id, MAX_ID_CHARS)
    return custom_id


def batch_request(record: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """An OpenAI Batch line as (prompt form, the row that it amounts to); raises PromptError."""
    method, url, body = record.get("method"), record.get("url"), record["body"]
    if method not in (None, "POST"):
        refuse(BadRowCode.BAD_BATCH_LINE, f"method is {shown(method)}, must be POST")
    if not (url is None or (isinstance(url, str) and url in BATCH_FORMS)):
        refuse(BadRowCode.BAD_BATCH_LINE, f"url is {shown(url)}, must be one of {', '.join(BATCH_FORMS)}")
    if not isinstance(body, dict):
        refuse(BadRowCode.BAD_BATCH_LINE, f"body is {kind(body)}, must be an object")
    for name in ("sampling", *CHAT_OPTIONS):
        if record.get(name) is not None:
            refuse(BadRowCode.BAD_BATCH_LINE, f"{name} stands beside body; the keys of a Batch line go into its body")
    given = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    prompt_forms = [form for form in BATCH_FORMS.values() if form in given]
    if len(prompt_forms) != 1 or (url is not None and BATCH_FORMS[cast(str, url)] != prompt_forms[0]):
        wanted = "either messages or prompt" if url is None else f"{BATCH_FORMS[cast(str, url)]}, which {url} takes"
        found = " and ".join(prompt_forms) or "neither messages nor prompt"
        refuse(BadRowCode.BAD_BATCH_LINE, f"body has {found}; it must have {wanted}")
    value = given.pop(prompt_forms[0])
    form = "prompt_token_ids" if prompt_forms[0] == "prompt" and isinstance(value, list) else prompt_forms[0]
    options = {name: given.pop(name) for name in CHAT_OPTIONS if name in given}
    return form, {form: value, **options, "sampling": _batch_sampling(given)}


def batch_url(form: str) -> str:
    """The `url` whose answers a prompt form gets."""
    return CHAT_URL if form == "messages" else COMPLETION_URL


def _batch_sampling(given: dict[str, object]) -> dict[str, object]:
    """The sampling keys of a body, under this project's names."""
    if "max_completion_tokens" in given:
        wanted = given.pop("max_completion_tokens")
        if given.setdefault("max_tokens", wanted) != wanted:
            refuse(BadRowCode.BAD_BATCH_LINE, "body has max_tokens and max_completion_tokens that differ")
    for key, value in NEUTRAL.items():
        if given.get(key) == value:
            del given[key]
    for key in given:
        if key not in SAMPLING_KEYS:
            supported = ", ".join(
                ("model", "messages", "prompt", *CHAT_OPTIONS, "max_completion_tokens", *SAMPLING_KEYS)
            )
            refuse(BadRowCode.UNSUPPORTED_KEY, f"body has key {shown(key)}; supported are {supported}")
    return given
