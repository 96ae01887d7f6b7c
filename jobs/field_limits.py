"""How long the fields of a row may be: what is longer could never be answered, and must not fill the memory."""

from jobs.refusal import BadRowCode, refuse

MAX_TEXT_CHARS = 1024**2
"""Of a prompt or a message's content; a quarter of a million tokens at the least."""
MAX_PROMPT_TOKENS = 1024**2
MAX_TOOLS = 1024
MAX_ID_CHARS = 4096
MAX_STOPS = 256
"""Stop strings of a row."""
MAX_STOP_CHARS = 4096
MAX_STOP_IDS = 4096


def check_length(name: str, text: str, most: int = MAX_TEXT_CHARS) -> None:
    """Raises PromptError for a text that is longer."""
    if len(text) > most:
        refuse(BadRowCode.FIELD_TOO_LONG, f"{name} has {len(text):,} characters; at most {most:,} are allowed")


def check_count(name: str, count: int, most: int) -> None:
    """Raises PromptError for a list that is longer."""
    if count > most:
        refuse(BadRowCode.FIELD_TOO_LONG, f"{name} has {count:,} entries; at most {most:,} are allowed")
