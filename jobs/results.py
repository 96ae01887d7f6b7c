"""Answers and failures of one run: logs while it goes on, final files at its end, and whether these are unchanged."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from jobs import disk
from jobs.batch_output import BatchForm
from jobs.line_index import CHUNK, RowLogError
from jobs.manifest import Manifest
from jobs.rows import BadRow, InputRow
from jobs.writer import (
    PARTIAL_FAILURES_NAME,
    PARTIAL_NAME,
    FailureWriter,
    GenerationWriter,
    OutputFile,
)

_ANSWERED, _FAILED = 1, 2


class ResultsError(RuntimeError):
    """The results of a run are not what they must be."""


class Results:
    """The two writers of a run, and what they know together: which rows are done.

    The key of a result is (row, sample), where `row` is the input row's ordinal; ids and prompts are data. The final
    files are written when every row of the input has one. Once the manifest names them with their hashes, the logs may
    go; until then any attempt can write them again.
    """

    def __init__(
        self,
        directory: Path,
        format: str = "jsonl",
        keep: Sequence[str] = (),
        *,
        batch: BatchForm | None = None,
        power: bool = True,
        resumed: bool = False,
    ) -> None:
        """RowLogError where an earlier attempt's logs contradict themselves or each other."""
        self.generations = GenerationWriter(directory, format, keep, batch=batch, power=power, resumed=resumed)
        self._batch = batch
        self.failures = FailureWriter(directory, power=power, resumed=resumed)
        answered, failed = (np.unique(writer.log.index().rows) for writer in (self.generations, self.failures))
        both = np.intersect1d(answered, failed, assume_unique=True)
        if len(both):
            raise RowLogError(f"{directory}: row {both[0]} was both answered and refused")
        self._done = np.union1d(answered, failed)
        """uint32, ascending: of earlier attempts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.generations.close()
        self.failures.close()

    @property
    def num_done(self) -> int:
        """Rows that earlier attempts have done."""
        return len(self._done)

    def facts(self) -> dict[str, int]:
        """What an attempt begins with."""
        logs = (self.generations.log, self.failures.log)
        return {
            "answered": logs[0].num_flushed,
            "failed": logs[1].num_flushed,
            "cut_bytes": sum(log.num_cut_bytes for log in logs),
        }

    def missing(self, rows: Iterable[InputRow | BadRow]) -> Iterator[InputRow | BadRow]:
        """Those of the input's rows, in their order, that no earlier attempt has done."""
        done = iter(self._done.tolist() if len(self._done) < 65536 else self._done)
        next_done = next(done, None)
        for row in rows:
            if row.row != next_done:
                yield row
                continue
            next_done = next(done, None)

    def check_against(self, counts: dict[str, Any] | None) -> None:
        """Raises ResultsError where rows are gone that an earlier attempt, by its manifest, had acknowledged."""
        for name, writer in (("answered", self.generations), ("failed", self.failures)):
            told = (counts or {}).get(name, 0)
            if writer.num_flushed < told:
                raise ResultsError(
                    f"{writer.log.path}: has {writer.num_flushed} rows, but the manifest says that {told} were {name}; "
                    "the file has been changed"
                )

    def finish(self, num_rows: int) -> list[OutputFile]:
        """Writes the final files of an input of `num_rows` rows; ResultsError unless each has one result."""
        self._check_every_row_has_one(num_rows)
        errors = [] if self._batch is None else [self.failures.finish_batch(self._batch)]
        failures = self.failures.finish()
        return [self.generations.finish(), failures, *errors]

    def _check_every_row_has_one(self, num_rows: int) -> None:
        results = np.zeros(num_rows, np.uint8)  # 1 MB a million
        for result, log in ((_ANSWERED, self.generations.log), (_FAILED, self.failures.log)):
            rows = log.index().rows
            if len(rows) and rows.max() >= num_rows:
                raise ResultsError(f"{log.path}: has row {rows.max()}, but only {num_rows} rows were read")
            for first in range(0, len(rows), CHUNK):  # as a whole, the index would be copied to 64 bits
                results[rows[first : first + CHUNK]] |= result
        both = _ANSWERED | _FAILED
        for what, wrong in (("no result", results == 0), ("been answered and has failed", results == both)):
            if wrong.any():
                raise ResultsError(
                    f"row {int(wrong.argmax())} has {what} ({int(wrong.sum())} rows like it, {num_rows} were read)"
                )

    def remove_logs(self) -> None:
        """Once it is written down that the final files are there."""
        self.generations.remove_log()
        self.failures.remove_log()


def verified_counts(directory: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The counts of a run whose results are all there and are, byte for byte, what it wrote.

    None where the run has not come so far; ResultsError where a file has been changed since. Removes the logs, which
    are of no more use.
    """
    outputs = manifest.get("output")
    if outputs is None:
        return None
    for output in outputs:
        path = directory / output["path"]
        if not path.is_file():
            raise ResultsError(f"{path}: is gone; the manifest has it with {output['num_rows']} rows")
        num_bytes, sha256 = disk.sha256_of(path)
        if (num_bytes, sha256) != (output["num_bytes"], output["sha256"]):
            raise ResultsError(
                f"{path}: has {num_bytes} bytes and the sha256 {sha256}; the run wrote {output['num_bytes']} bytes "
                f"with {output['sha256']}"
            )
    for name in (PARTIAL_NAME, PARTIAL_FAILURES_NAME):
        disk.remove(directory / name)
    return manifest["counts"]
