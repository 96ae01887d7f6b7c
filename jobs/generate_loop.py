"""The loop of a generate job: rows in, steps, rows out."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.progress import Progress
from jobs.rows import BadRow, InputRow
from jobs.stop import StopRequest
from jobs.writer import FailureWriter, Generation, GenerationWriter
from nanovllm.engine.llm_engine import SequenceOutput
from nanovllm.errors import PromptError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.assembly import Assembly


class TooManyFailures(RuntimeError):
    """reader.max_failures was exceeded."""


class GenerateLoop:
    """Answers every row of an input.

    Rows are taken in only while fewer than `max_num_seqs` wait for the engine, so memory does not grow with the
    input. A finished row is on disk before the next step is committed. A row that cannot be answered goes to the
    failures and touches no other.
    """

    def __init__(
        self,
        assembly: "Assembly",
        rows: Iterator[InputRow | BadRow],
        generations: GenerationWriter,
        failures: FailureWriter,
        progress: Progress,
        *,
        source: str,
        sampling: SamplingParams,
        max_failures: int | None,
    ) -> None:
        """`source` names the input in the log; `sampling` is the job's, a row's own wins over it, key by key."""
        self.num_answered = 0
        self.num_failed = 0
        self._engine = assembly.engine
        self._intake = assembly.intake
        self._rows = rows
        self._source = source
        self._generations = generations
        self._failures = failures
        self._progress = progress
        self._sampling = sampling
        self._max_failures = max_failures
        self._running: dict[int, InputRow] = {}
        self._num_output_tokens = 0
        self._exhausted = False

    def run(self, stop: StopRequest) -> None:
        """Until every row is answered or has failed; on a stop request, running rows are given up."""
        for recorder in self._engine.recorders:
            recorder.on_start(None, None, self._source)
        try:
            while self._feed() or self._engine.has_work():
                for output in self._engine.step():
                    self._finish(output)
                self._generations.flush()
                self._show_progress()
                stop.check()
            self._show_progress()
        except (KeyboardInterrupt, TooManyFailures):
            self._engine.abort_all()
            raise
        finally:
            self._progress.close()
        for recorder in self._engine.recorders:
            recorder.on_end()

    def _show_progress(self) -> None:
        self._progress.update(self.num_answered + self.num_failed, self._num_output_tokens, self.num_failed)

    def counts(self) -> dict[str, int]:
        """Rows so far: all of them, answered, failed."""
        return {
            "rows": self.num_answered + self.num_failed,
            "answered": self.num_answered,
            "failed": self.num_failed,
        }

    def _feed(self) -> bool:
        """Take rows in while few wait; whether there may be more."""
        while not self._exhausted and self._engine.num_waiting < self._engine.scheduler.max_num_seqs:
            row = next(self._rows, None)
            if row is None:
                self._exhausted = True
            elif isinstance(row, BadRow):
                self._fail(row)
            else:
                self._take(row)
        return not self._exhausted

    def _take(self, row: InputRow) -> None:
        sampling = row.sampling.over(self._sampling) if row.sampling else self._sampling
        try:
            request = self._intake.request(
                prompt=row.prompt,
                messages=row.messages,
                prompt_token_ids=row.prompt_token_ids,
                sampling=sampling,
                row=row.row,
                request_id=str(row.id),
            )
        except PromptError as error:
            self._fail(row.failed(error))
            return
        self._intake.add(request)
        self._running[row.row] = row

    def _finish(self, output: SequenceOutput) -> None:
        row = self._running.pop(output.row)
        self._num_output_tokens += len(output.token_ids)
        if output.finish_reason == "error":
            reason = f"the model's logits were not finite after {len(output.token_ids)} output tokens"
            self._fail(row.failed(PromptError("logits_not_finite", reason)))
            return
        self.num_answered += 1
        self._generations.write(
            Generation(
                row=row.row,
                sample=output.sample,
                id=row.id,
                text=self._intake.text(output),
                token_ids=output.token_ids,
                finish_reason=output.finish_reason,
                num_prompt_tokens=output.num_prompt_tokens,
                columns=row.columns,
            )
        )

    def _fail(self, row: BadRow) -> None:
        self.num_failed += 1
        self._failures.write(row)
        if self._max_failures is not None and self.num_failed > self._max_failures:
            raise TooManyFailures(
                f"more than reader.max_failures={self._max_failures} rows failed; the last one is row {row.row} "
                f"({row.file}, line {row.line}): {row.reason}"
            )
