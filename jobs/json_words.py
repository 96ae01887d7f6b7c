"""Values in JSON's words, as messages show them."""

import json
import reprlib


def kind(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return f"the number {shown(value)}"
    if isinstance(value, str):
        return f"the string {shown(value)}"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def shown(value: object, limit: int = 60) -> str:
    """The value as in JSON, shortened to about `limit` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        text = json.dumps(value[:limit], ensure_ascii=False)
        return text if len(value) <= limit else f'{text[:-1]}..."'
    short = reprlib.Repr()
    short.maxother = short.maxlong = limit
    return short.repr(value)
