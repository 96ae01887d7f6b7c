"""reader.prompt: how a row's columns become its prompt."""

import math
import string
from collections.abc import Mapping

from jobs.json_words import kind, shown
from jobs.refusal import BadRowCode, refuse


class PromptTemplate:
    """reader.prompt: a column's name, or a text with {column} in it; {{ and }} are plain braces.

    Raises ValueError for a template that is none.
    """

    def __init__(self, text: str) -> None:
        self._parts = _template_parts(text)
        self.columns = tuple(column for _, column in self._parts if column is not None)

    def fill(self, record: Mapping[str, object]) -> str:
        """The prompt of one record; raises PromptError where a column is missing or no string and no number."""
        return "".join(
            literal if column is None else literal + _column_text(record, column) for literal, column in self._parts
        )


def _template_parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, column after it or None) pairs."""
    if "{" not in text and "}" not in text:
        return (("", text),)
    wanted = "use {column} for a column and {{ or }} for a brace"
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"reader.prompt={shown(text)}: {error}; {wanted}") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion or set(name) & set(".[]{}")):
            raise ValueError(f"reader.prompt={shown(text)}: a field must be the name of a column alone; {wanted}")
    if all(name is None for _, name, _, _ in parsed):
        raise ValueError(f"reader.prompt={shown(text)}: names no column, so all prompts were the same; {wanted}")
    return tuple((literal, name) for literal, name, _, _ in parsed)


def _column_text(record: Mapping[str, object], column: str) -> str:
    value = record.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        refuse(BadRowCode.BAD_COLUMN, f"reader.prompt needs column {shown(column)}, which the row does not have")
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(
            BadRowCode.BAD_COLUMN,
            f"column {shown(column)} is {kind(value)}; reader.prompt needs a string or a number",
        )
    if isinstance(value, float) and not math.isfinite(value):
        refuse(BadRowCode.BAD_NUMBER, f"column {shown(column)} is {value}; reader.prompt needs a finite number")
    return str(value)
