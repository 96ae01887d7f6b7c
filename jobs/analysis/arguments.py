"""The words of an analysis command: key=value, taken as they stand.

Hydra's grammar has no place here: it would reject the commas and parentheses of a query or a path.
"""

from collections.abc import Mapping, Sequence

from jobs.usage import UsageError


def parse(words: Sequence[str], keys: Mapping[str, str], required: Sequence[str]) -> dict[str, str]:
    """Values by key; `keys` maps each key to what it means. UsageError names the word and what is allowed."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in keys:
            raise UsageError(f"{word}: must be one of {', '.join(f'{name}=...' for name in keys)}")
        if key in found:
            raise UsageError(f"{key}= stands there twice; one value is taken")
        if not value:
            raise UsageError(f"{key}=: is empty; it must be {keys[key]}")
        found[key] = value
    for key in required:
        if key not in found:
            raise UsageError(f"{key}= is missing; it must be {keys[key]}")
    return found


def help_text(module: str, about: str, keys: Mapping[str, str], required: Sequence[str]) -> str:
    words = [f"{key}=..." if key in required else f"[{key}=...]" for key in keys]
    lines = [f"python -m {module} {' '.join(words)}", "", about.strip(), ""]
    return "\n".join(lines + [f"  {key}=   {meaning}" for key, meaning in keys.items()])


def whole_number(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{key}={text}: must be a whole number, 0 or more")
    return int(text)


def one_of(key: str, text: str, allowed: Sequence[str]) -> str:
    if text not in allowed:
        raise UsageError(f"{key}={text}: must be one of {', '.join(allowed)}")
    return text
