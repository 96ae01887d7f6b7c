"""What a tree of config dataclasses allows, in words that a user understands."""

import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_LISTS = {int: "a list of integers, such as [1,2]", str: "a list of texts, such as [a,b]"}


def keys(schema: type) -> dict[str, typing.Any]:
    """Every dotted key with its type; a group's own key maps to its dataclass."""
    found: dict[str, typing.Any] = {}
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        found[f.name] = hints[f.name]
        if is_dataclass(hints[f.name]):
            found |= {f"{f.name}.{key}": hint for key, hint in keys(hints[f.name]).items()}
    return found


def allowed(hint: typing.Any) -> str:
    """The type in words: int | None becomes "an integer or null"."""
    if isinstance(hint, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return " or ".join([*(allowed(option) for option in options), "null"])
    if typing.get_origin(hint) is list:
        return _LISTS[typing.get_args(hint)[0]]
    if typing.get_origin(hint) is dict:
        return "a mapping, such as {name: value}"
    if is_dataclass(hint):
        return f"one of the files of its group, or a mapping of {', '.join(keys(typing.cast(type, hint)))}"
    return _WORDS[hint]


def close_match(word: str, words: Iterable[str]) -> str:
    """`; did you mean X?` for a misspelt word, or nothing."""
    candidates = list(words)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not near:
        last = word.rsplit(".", 1)[-1]
        near = [c for c in candidates if c.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""


def siblings(key: str, schema: type) -> tuple[str, list[str]]:
    """The deepest existing group above a key ("" at the top), and the names in it."""
    known = keys(schema)
    group = key.rpartition(".")[0]
    while group and not is_dataclass(known.get(group)):
        group = group.rpartition(".")[0]
    return group, [f.name for f in fields(known[group] if group else schema)]
