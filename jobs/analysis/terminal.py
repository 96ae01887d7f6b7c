"""What goes to the terminal: lines, and nothing that a terminal would obey."""

from collections.abc import Iterable


def show(lines: Iterable[str]) -> None:
    """Prints the lines; a character of a row's id or a query's answer that would move the cursor becomes a box."""
    for line in lines:
        print(printable(line))


def printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
