"""A row's conversation: messages, and what goes to the chat template with them."""

from collections.abc import Mapping, Sequence

from jobs.field_limits import MAX_TOOLS, check_count, check_length
from jobs.json_words import kind, shown
from jobs.refusal import BadRowCode, refuse
from nanovllm.prompts import RESERVED_KWARGS, Conversation

CHAT_OPTIONS = ("tools", "chat_template_kwargs", "continue_final_message")
"""What a row with messages may have besides."""
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def as_conversation(
    record: Mapping[str, object], *, system: str | None, template_kwargs: Mapping[str, object]
) -> Conversation:
    """The conversation of a row with `messages`; raises PromptError.

    `system` goes in front unless there is a system message; `template_kwargs` are the job's, the row's own win over
    them key by key.
    """
    messages = _messages(record["messages"])
    if system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    continues = _continues(record.get("continue_final_message"), messages[-1])
    return Conversation(
        messages=messages,
        tools=_tools(record.get("tools")),
        template_kwargs={**template_kwargs, **_template_kwargs(record.get("chat_template_kwargs"))},
        continue_final_message=continues,
    )


def check_template_kwargs(key: str, value: Mapping[str, object]) -> None:
    """Raises ValueError for a name that has a meaning of its own; `key` is what the message calls it."""
    reserved = sorted(RESERVED_KWARGS & set(value))
    if reserved:
        raise ValueError(f"{key} has {', '.join(reserved)}, which no variable of a template may be called")


def _messages(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list):
        refuse(BadRowCode.BAD_MESSAGES, f"messages is {kind(value)}, must be a list of {{role, content}}")
    if not value:
        refuse(BadRowCode.EMPTY_PROMPT, "messages is an empty list")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, message: object) -> dict[str, object]:
    """The message without its nulls, its content as one text."""
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        refuse(BadRowCode.BAD_MESSAGES, f"{place} is {kind(message)}, must be {{role, content}}")
    given = {key: value for key, value in message.items() if value is not None}
    if isinstance(given.get("content"), list):
        given["content"] = _joined_parts(f"{place}.content", given["content"])
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        refuse(BadRowCode.BAD_MESSAGES, f"{place}.role is {shown(role)}, must be one of {', '.join(ROLES)}")
    for key, value in given.items():
        if key not in MESSAGE_KEYS:
            refuse(BadRowCode.BAD_MESSAGES, f"{place} has key {shown(key)}; supported are {', '.join(MESSAGE_KEYS)}")
        if key != "tool_calls" and not isinstance(value, str):
            refuse(BadRowCode.BAD_MESSAGES, f"{place}.{key} is {kind(value)}, must be a string")
        if isinstance(value, str):
            check_length(f"{place}.{key}", value)
    if "tool_calls" in given:
        _check_tool_calls(place, role, given["tool_calls"])
    elif content is None:
        absent = "null" if "content" in message else "missing"
        refuse(BadRowCode.BAD_MESSAGES, f"{place}.content is {absent}, must be a string")
    return given


def _joined_parts(place: str, parts: Sequence[object]) -> str:
    """The text of a content in parts, a line break between two of them, as vLLM has it.

    A template would get them as a list, and most templates of models for text alone can only add strings.
    """
    if not parts:
        refuse(BadRowCode.BAD_MESSAGES, f"{place} is an empty list, must be a string or a list of text parts")
    return "\n".join(_part_text(f"{place}[{index}]", part) for index, part in enumerate(parts))


def _part_text(place: str, part: object) -> str:
    wanted = '{"type": "text", "text": ...}'
    if not isinstance(part, dict):
        refuse(BadRowCode.BAD_MESSAGES, f"{place} is {kind(part)}, must be {wanted}")
    given = {key: value for key, value in part.items() if value is not None}
    if given.get("type") != "text":
        refuse(BadRowCode.BAD_MESSAGES, f"{place}.type is {shown(given.get('type'))}; only text is supported: {wanted}")
    for key in given:
        if key not in ("type", "text"):
            refuse(BadRowCode.BAD_MESSAGES, f"{place} has key {shown(key)}; a part is {wanted}")
    text = given.get("text")
    if not isinstance(text, str):
        refuse(BadRowCode.BAD_MESSAGES, f"{place}.text is {kind(text)}, must be a string")
    return text


def _check_tool_calls(place: str, role: object, calls: object) -> None:
    if role != "assistant":
        refuse(BadRowCode.BAD_MESSAGES, f"{place}.tool_calls: only an assistant calls tools, this is {shown(role)}")
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        refuse(BadRowCode.BAD_MESSAGES, f"{place}.tool_calls is {kind(calls)}, must be a list of objects")


def _tools(value: object) -> list[dict[str, object]] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        refuse(BadRowCode.BAD_TOOLS, f"tools is {kind(value)}, must be a list of objects")
    check_count("tools", len(value), MAX_TOOLS)
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            refuse(BadRowCode.BAD_TOOLS, f"tools[{index}] is {shown(tool)}, must be {wanted}")
    return value


def _template_kwargs(value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(BadRowCode.BAD_CHAT_OPTION, f"chat_template_kwargs is {kind(value)}, must be an object")
    try:
        check_template_kwargs("chat_template_kwargs", value)
    except ValueError as error:
        refuse(BadRowCode.BAD_CHAT_OPTION, str(error))
    return value


def _continues(value: object, last: Mapping[str, object]) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        refuse(BadRowCode.BAD_CHAT_OPTION, f"continue_final_message is {kind(value)}, must be true or false")
    if value and not last.get("content"):
        refuse(BadRowCode.BAD_CHAT_OPTION, "continue_final_message: the last message has no content to go on with")
    return value
