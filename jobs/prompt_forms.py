"""The forms that a row's prompt may have: text, messages, token ids."""

from jobs.json_words import kind, shown
from jobs.refusal import BadRowCode, refuse

PROMPT_FORMS = ("prompt", "messages", "prompt_token_ids")
"""The columns that each make a row's prompt; an OpenAI Batch line is the fourth form."""
ROLES = ("system", "user", "assistant", "tool")
MAX_TOKEN_ID = 2**31 - 1


def as_prompt(value: object) -> str:
    """A text that is not empty; raises PromptError."""
    if not isinstance(value, str):
        refuse(BadRowCode.BAD_PROMPT, f"prompt is {kind(value)}, must be a string")
    if not value:
        refuse(BadRowCode.EMPTY_PROMPT, "prompt is an empty string")
    return value


def as_messages(value: object) -> list[dict[str, str]]:
    """Messages of {role, content}, at least one; raises PromptError."""
    if not isinstance(value, list):
        refuse(BadRowCode.BAD_MESSAGES, f"messages is {kind(value)}, must be a list of {{role, content}}")
    if not value:
        refuse(BadRowCode.EMPTY_PROMPT, "messages is an empty list")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        refuse(BadRowCode.BAD_MESSAGES, f"messages[{index}] is {kind(message)}, must be {{role, content}}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        refuse(BadRowCode.BAD_MESSAGES, f"messages[{index}].role is {shown(role)}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        refuse(BadRowCode.BAD_MESSAGES, f"messages[{index}].content is {kind(content)}, must be a string")
    for key, extra in message.items():
        if extra is not None and key not in ("role", "content"):
            refuse(
                BadRowCode.BAD_MESSAGES, f"messages[{index}] has key {shown(key)}; only role and content are supported"
            )
    return {"role": role, "content": content}


def as_token_ids(value: object) -> list[int]:
    """Token ids within [0, MAX_TOKEN_ID], at least one; raises PromptError."""
    if not isinstance(value, list):
        refuse(BadRowCode.BAD_TOKEN_IDS, f"prompt_token_ids is {kind(value)}, must be a list of integers")
    if not value:
        refuse(BadRowCode.EMPTY_PROMPT, "prompt_token_ids is an empty list")
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID:
        index, wrong = _first_wrong_token_id(value)
        refuse(
            BadRowCode.BAD_TOKEN_IDS,
            f"prompt_token_ids[{index}] is {shown(wrong)}, must be an integer from 0 to {MAX_TOKEN_ID}",
        )
    return value


def _first_wrong_token_id(ids: list[object]) -> tuple[int, object]:
    return next((i, t) for i, t in enumerate(ids) if type(t) is not int or not 0 <= t <= MAX_TOKEN_ID)
