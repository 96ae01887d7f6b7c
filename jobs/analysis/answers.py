"""The answered rows of a run, complete or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq

from jobs.usage import UsageError
from jobs.writer import FAILURES_NAME, PARTIAL_FAILURES_NAME, PARTIAL_NAME, generations_name

BATCH_ID = "batch_req_"
"""What the id of a line in OpenAI's Batch form begins with; the row follows."""


class _Line(msgspec.Struct):
    row: int
    sample: int
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str
    token_ids: list[int]


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    index: int
    finish_reason: str
    text: str | None = None
    """Of a completion; a chat's is in its message."""
    message: _Message | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Body(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


class _Response(msgspec.Struct):
    body: _Body


class _BatchLine(msgspec.Struct):
    """jobs/batch_output.py; token ids are not in it."""

    id: str
    custom_id: str
    response: _Response

    def as_row(self) -> dict[str, Any]:
        """In our own form: one sample, since a request has one; without its token ids."""
        body = self.response.body
        (choice,) = body.choices
        return {
            "row": int(self.id.removeprefix(BATCH_ID)),
            "sample": choice.index,
            "id": self.custom_id,
            "text": choice.text if choice.message is None else choice.message.content,
            "finish_reason": choice.finish_reason,
            "num_prompt_tokens": body.usage.prompt_tokens,
            "num_output_tokens": body.usage.completion_tokens,
        }

    def as_line(self) -> _Line:
        """Its tokens are known by their number alone."""
        row = self.as_row()
        known = {name: row[name] for name in _Line.__struct_fields__ if name in row}
        return _Line(**known, token_ids=[0] * row["num_output_tokens"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Columns of the generations file, in its order."""

    path: Path | None
    """None where the run has none yet."""
    row: np.ndarray
    sample: np.ndarray
    num_prompt_tokens: np.ndarray
    num_output_tokens: np.ndarray
    num_token_ids: np.ndarray
    """int64 [rows], as the others"""
    finish_reason: list[str]


def generations_file(run: Path) -> Path | None:
    """The final file, else the partial one, else None."""
    names = (generations_name("jsonl"), generations_name("parquet"), PARTIAL_NAME)
    return next((run / name for name in names if (run / name).is_file()), None)


def read_answers(run: Path) -> Answers:
    path = generations_file(run)
    if path is None:
        return _answers(None, [])
    if path.suffix == ".parquet":
        names = ["row", "sample", "num_prompt_tokens", "num_output_tokens", "finish_reason", "token_ids"]
        return _answers(path, [_Line(**row) for row in pq.read_table(path, columns=names).to_pylist()])
    return _answers(path, _lines(path))


def read_tokens(run: Path) -> dict[tuple[int, int], list[int]]:
    """Token ids of each (row, sample); none where the file has OpenAI's Batch form, which leaves them out."""
    path = generations_file(run)
    if path is None:
        return {}
    if path.suffix == ".parquet":
        rows = pq.read_table(path, columns=["row", "sample", "token_ids"]).to_pylist()
        return {(row["row"], row["sample"]): row["token_ids"] for row in rows}
    if _has_batch_form(path):
        return {}
    return {(line.row, line.sample): line.token_ids for line in _lines(path)}


def answer_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a generations file in JSONL; of one in OpenAI's Batch form what is known of our own columns."""
    if _has_batch_form(path):
        of_batch = msgspec.json.Decoder(_BatchLine).decode
        return (of_batch(line).as_row() for line in whole_lines(path))
    return (msgspec.json.decode(line) for line in whole_lines(path))


def answers_of_row(run: Path, row: int) -> list[dict[str, Any]]:
    """The answers of one input row, its samples in order, as objects with at least what `_BatchLine.as_row` gives."""
    path = generations_file(run)
    if path is None:
        return []
    if path.suffix == ".parquet":
        found = pq.read_table(path, filters=[("row", "=", row)]).to_pylist()
    else:
        found = [answer for answer in answer_rows(path) if answer["row"] == row]
    return sorted(found, key=lambda answer: answer["sample"])


def failures(run: Path) -> list[dict[str, Any]]:
    """The lines of failures.jsonl, in its order, or of the partial file that a run may have before."""
    path = next((run / name for name in (FAILURES_NAME, PARTIAL_FAILURES_NAME) if (run / name).is_file()), None)
    return [] if path is None else [msgspec.json.decode(line) for line in whole_lines(path)]


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a JSONL file. The last one may be torn where a process was killed while it wrote: it is left out.

    UsageError for any other line that is no JSON.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            is_torn = not line.endswith(b"\n")
            try:
                msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                if is_torn:
                    return
                raise UsageError(f"{path}, line {number}: is no JSON: {error}") from error
            yield line


def _lines(path: Path) -> list[_Line]:
    if _has_batch_form(path):
        of_batch = msgspec.json.Decoder(_BatchLine).decode
        return [of_batch(line).as_line() for line in whole_lines(path)]
    decode = msgspec.json.Decoder(_Line).decode
    return [decode(line) for line in whole_lines(path)]


def _has_batch_form(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.readline().startswith(b'{"id":"' + BATCH_ID.encode())


def _answers(path: Path | None, lines: list[_Line]) -> Answers:
    def column(values: Iterator[int]) -> np.ndarray:
        return np.fromiter(values, np.int64, len(lines))

    return Answers(
        path=path,
        row=column(line.row for line in lines),
        sample=column(line.sample for line in lines),
        num_prompt_tokens=column(line.num_prompt_tokens for line in lines),
        num_output_tokens=column(line.num_output_tokens for line in lines),
        num_token_ids=column(len(line.token_ids) for line in lines),
        finish_reason=[line.finish_reason for line in lines],
    )
