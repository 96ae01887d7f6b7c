"""Prompts as they are given, before they are token ids."""

import msgspec


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """Messages for the model's chat template."""

    messages: list[dict[str, object]]
    """What chat templates take: {role, content}, and tool_calls, tool_call_id, name, reasoning_content."""
    tools: list[dict[str, object]] | None = None
    """JSON schemas of the functions that the model may call."""
    template_kwargs: dict[str, object] = {}
    """Further variables of the template, such as enable_thinking."""
    continue_final_message: bool = False
    """The model goes on with the last message instead of beginning an answer."""


class PromptSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a prompt process is told first: everything that decides how a prompt becomes token ids."""

    tokenizer: str
    """tokenizer.json, as it was loaded."""
    chat_template: str | None
    tool_template: str | None
    """The template for conversations with tools; mostly the same one."""
    special_tokens: dict[str, str | list[str]]
    """The template's variables bos_token, eos_token, ..."""


RESERVED_KWARGS = frozenset(
    (
        "messages",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
    )
)
"""Names that chat_template_kwargs cannot use: they have keys of their own, or change the template itself."""
