"""Results in the form of OpenAI's Batch API: one line for each request, samples as choices, and an error file."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, BinaryIO, cast

import msgspec

FORMAT = "openai_batch"
ERRORS_NAME = "batch_errors.jsonl"
"""Beside failures.jsonl, which says the same with files and line numbers."""
CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
SERVER_CODES = ("logits_not_finite",)
"""Codes of failures that are not the request's fault."""

NO_BATCH_LINE = "not_batch_line"
"""Of a row that has no custom_id; its `id` is another thing."""

Record = dict[str, Any]


class BatchForm:
    """Turns lines of our own form, in input order, into Batch output lines.

    Of one run, always the same: ids are made from the row, and `created` is when the run began.
    """

    def __init__(self, model: str, created: int) -> None:
        """`model` is named in every answer; `created` is in seconds since 1970."""
        self._model = model
        self._created = created

    def write_answers(self, file: BinaryIO, lines: Iterable[bytes]) -> None:
        encode = msgspec.json.Encoder().encode
        for _, samples in groupby(_records(lines), key=lambda record: record["row"]):
            file.write(encode(self._answer(list(samples))) + b"\n")

    def write_errors(self, file: BinaryIO, lines: Iterable[bytes]) -> None:
        """From lines of failures.jsonl."""
        encode = msgspec.json.Encoder().encode
        for record in _records(lines):
            file.write(encode(_error(record)) + b"\n")

    def _answer(self, samples: list[Record]) -> Record:
        first = samples[0]
        is_chat = first["url"] == CHAT_URL
        num_prompt, num_output = first["num_prompt_tokens"], sum(sample["num_output_tokens"] for sample in samples)
        body = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{first['row']}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [_choice(sample, is_chat) for sample in samples],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output,
            },
        }
        return {
            "id": f"batch_req_{first['row']}",
            "custom_id": first["id"],
            "response": {"status_code": 200, "request_id": f"req_{first['row']}", "body": body},
            "error": None,
        }


def _choice(sample: Record, is_chat: bool) -> Record:
    said = {"message": {"role": "assistant", "content": sample["text"]}} if is_chat else {"text": sample["text"]}
    return {
        "index": sample["sample"],
        **said,
        "logprobs": sample["logprobs"],
        "finish_reason": sample["finish_reason"],
    }


def _error(failure: Record) -> Record:
    status, kind = (500, "server_error") if failure["code"] in SERVER_CODES else (400, "invalid_request_error")
    message = f"{failure['reason']} (line {failure['line']} of {failure['file']})"
    error = {"message": message, "type": kind, "param": None, "code": failure["code"]}
    return {
        "id": f"batch_req_{failure['row']}",
        "custom_id": failure["id"] if isinstance(failure["id"], str) and failure["code"] != NO_BATCH_LINE else None,
        "response": {"status_code": status, "request_id": f"req_{failure['row']}", "body": {"error": error}},
        "error": {"code": failure["code"], "message": message},
    }


def _records(lines: Iterable[bytes]) -> Iterator[Record]:
    decode = msgspec.json.Decoder(dict[str, object]).decode
    return (cast(Record, decode(line)) for line in lines)
