"""Rows as requests: templates rendered, texts tokenised and everything checked, before the step loop sees them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.row_feed import RowFeed
from jobs.rows import BadRow, InputRow
from nanovllm.errors import PromptError
from nanovllm.intake import Intake, Request
from nanovllm.prompt_worker import MAX_BATCH
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyRow:
    """A row that the engine will take, without the texts that it was made from."""

    file: str
    line: int
    row: int
    id: str | int
    columns: Mapping[str, object] = field(default_factory=dict)
    url: str | None = None
    """Of a Batch line: which of OpenAI's forms its answer has."""
    request: Request

    def failed(self, error: PromptError) -> BadRow:
        """This row as the failure that came up in the engine."""
        return BadRow(
            file=self.file, line=self.line, row=self.row, id=self.id, code=str(error.code), reason=error.reason
        )


class ReadyRows:
    """The rows of a feed, in its order, as the engine takes them or as failures; runs in a feed's thread of its own."""

    def __init__(self, rows: RowFeed[InputRow | BadRow], intake: Intake, sampling: SamplingParams) -> None:
        """`sampling` is the job's; a row's own wins over it, key by key."""
        self.busy = False
        """Whether rows are being made ready, rather than waited for."""
        self._rows = rows
        self._intake = intake
        self._sampling = sampling

    def __iter__(self) -> Iterator[ReadyRow | BadRow]:
        while batch := self._rows.take_many(MAX_BATCH):
            self.busy = True
            yield from self._prepared(batch)
            self.busy = False

    def _prepared(self, batch: Sequence[InputRow | BadRow]) -> Iterator[ReadyRow | BadRow]:
        prompts = [row.text_or_chat for row in batch if isinstance(row, InputRow)]
        ids = iter(self._intake.prepare([prompt for prompt in prompts if prompt is not None]))
        for row in batch:
            if isinstance(row, BadRow):
                yield row
            elif row.prompt_token_ids is not None:
                yield self._ready(row, row.prompt_token_ids)
            else:
                yield self._ready(row, next(ids))

    def _ready(self, row: InputRow, ids: Sequence[int] | np.ndarray | PromptError) -> ReadyRow | BadRow:
        if isinstance(ids, PromptError):
            return row.failed(ids)
        sampling = row.sampling.over(self._sampling) if row.sampling else self._sampling
        try:
            request = self._intake.request(ids, sampling=sampling, row=row.row, request_id=str(row.id))
        except PromptError as error:
            return row.failed(error)
        return ReadyRow(
            file=row.file, line=row.line, row=row.row, id=row.id, columns=row.columns, url=row.url, request=request
        )


def weight(row: ReadyRow | BadRow) -> int:
    """About how many bytes of memory it takes."""
    return row.request.token_ids.nbytes if isinstance(row, ReadyRow) else row.weight
