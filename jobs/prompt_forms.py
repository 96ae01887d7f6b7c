"""The forms that a row's prompt may have: text or token ids; for messages see chat_forms."""

from jobs.field_limits import MAX_PROMPT_TOKENS, check_count, check_length
from jobs.json_words import kind, shown
from jobs.refusal import BadRowCode, refuse

PROMPT_FORMS = ("prompt", "messages", "prompt_token_ids")
"""The columns that each make a row's prompt; an OpenAI Batch line is the fourth form."""
MAX_TOKEN_ID = 2**31 - 1


def as_prompt(value: object) -> str:
    """A text that is not empty; raises PromptError."""
    if not isinstance(value, str):
        refuse(BadRowCode.BAD_PROMPT, f"prompt is {kind(value)}, must be a string")
    if not value:
        refuse(BadRowCode.EMPTY_PROMPT, "prompt is an empty string")
    check_length("prompt", value)
    return value


def as_token_ids(value: object, name: str = "prompt_token_ids") -> list[int]:
    """Token ids within [0, MAX_TOKEN_ID], at least one; raises PromptError, which calls the value `name`."""
    if not isinstance(value, list):
        refuse(BadRowCode.BAD_TOKEN_IDS, f"{name} is {kind(value)}, must be a list of integers")
    if not value:
        refuse(BadRowCode.EMPTY_PROMPT, f"{name} is an empty list")
    check_count(name, len(value), MAX_PROMPT_TOKENS)
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID:
        index, wrong = _first_wrong_token_id(value)
        refuse(
            BadRowCode.BAD_TOKEN_IDS,
            f"{name}[{index}] is {shown(wrong)}, must be an integer from 0 to {MAX_TOKEN_ID}",
        )
    return value


def _first_wrong_token_id(ids: list[object]) -> tuple[int, object]:
    return next((i, t) for i, t in enumerate(ids) if type(t) is not int or not 0 <= t <= MAX_TOKEN_ID)
