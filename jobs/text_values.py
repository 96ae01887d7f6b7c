"""Texts on a command line: taken as they stand where Hydra's grammar cannot read them."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

TEXT_KEYS = ("input", "resume", "model.path", "reader.prompt", "reader.system")
"""Their values are texts, file names and globs, whatever characters they hold."""


def as_text(word: str) -> str:
    """The word, or, where it sets a text that Hydra cannot read, the same with the quotes that let it.

    So reader.prompt='Translate: {text}' and input='part[0-3].jsonl' need no second pair of quotes. What Hydra can read,
    lists of a sweep among it, means what it means everywhere else.
    """
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in TEXT_KEYS or not value.strip() or _is_readable(word):
        return word
    # A backslash is only an escape in front of a quote, and at the end.
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    return f'{key}="{escaped}"'


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True
