"""A line as the row parser reads it: line 7 of in.jsonl, row 3."""

import json

from jobs.rows import BadRow, InputRow, RowParser


def parse(data: bytes | str | dict, **settings) -> InputRow | BadRow:
    if isinstance(data, dict):
        data = json.dumps(data)
    line = data.encode() if isinstance(data, str) else data
    return RowParser(**settings).from_line("in.jsonl", 7, 3, line)


def good(data: bytes | str | dict, **settings) -> InputRow:
    row = parse(data, **settings)
    assert isinstance(row, InputRow), row
    return row


def bad(data: bytes | str | dict, **settings) -> BadRow:
    row = parse(data, **settings)
    assert isinstance(row, BadRow), row
    return row
