"""The loop of a generate job: rows in, steps, rows out."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.figures import Figures
from jobs.journal import VALUE_BYTES, Journal
from jobs.outlook import Outlook, running_lengths
from jobs.progress import Pace, Progress
from jobs.ration import take_rows
from jobs.ready_rows import ReadyRow
from jobs.row_feed import RowFeed
from jobs.rows import BadRow
from jobs.stop import StopRequest
from jobs.turns import short_turns
from jobs.watchdog import Watchdog
from jobs.writer import FailureWriter, Generation, GenerationWriter
from nanovllm.engine.llm_engine import SequenceOutput
from nanovllm.errors import PromptError
from nanovllm.quiet_gc import collector_kept_out

if TYPE_CHECKING:
    from nanovllm.assembly import Assembly


class TooManyFailures(RuntimeError):
    """reader.max_failures was exceeded."""


class GenerateLoop:
    """Answers every row of an input.

    Rows are taken in only while fewer than `max_num_seqs` wait for the engine, so memory does not grow with the
    input. A finished row goes to the journal, behind the records of its steps, and counts once the journal has made it
    durable. A row that cannot be answered goes to the failures and touches no other.
    """

    def __init__(
        self,
        assembly: "Assembly",
        rows: RowFeed[ReadyRow | BadRow],
        journal: Journal,
        generations: GenerationWriter,
        failures: FailureWriter,
        figures: Figures,
        progress: Progress,
        watchdog: Watchdog,
        *,
        source: str,
        num_rows: int | None,
        in_step: bool,
        input_is_awaited: Callable[[], bool],
        max_failures: int | None,
    ) -> None:
        """`generations` and `failures` are stages of the journal, behind the records.

        `source` names the input in the log; `num_rows` of it are still to be read, null where nobody knows.
        `input_is_awaited`: whether there is no row because the input gives none, rather than for lack of work on it.

        `in_step`: the next row is always waited for, so that the same input gives the same schedule. Without it (an
        input that may pause, such as a pipe) what runs goes on while no row comes.
        """
        self._engine = assembly.engine
        self._intake = assembly.intake
        self._rows = rows
        self._source = source
        self._in_step = in_step
        self._journal = journal
        self._generations = generations
        self._failures = failures
        self._figures = figures
        self._progress = progress
        self._watchdog = watchdog
        self._num_rows = num_rows
        self._input_is_awaited = input_is_awaited
        self._outlook = Outlook(assembly.engine.scheduler.max_model_len)
        self._num_taken = 0
        self._max_failures = max_failures
        self._running: dict[int, ReadyRow] = {}
        self._num_failed = failures.num_flushed
        """Those that are not acknowledged yet included."""

    def run(self, stop: StopRequest, between_steps: Callable[[], object] = lambda: None) -> None:
        """Until every row is answered or has failed; on a stop request, running rows are given up."""
        for recorder in self._engine.recorders:
            recorder.on_start(None, None, self._source)
        try:
            with short_turns(), collector_kept_out() as collect:
                while self._feed(stop) or self._engine.has_work():
                    for output in self._engine.step():
                        self._finish(output)
                    self._watchdog.beats += 1
                    self._show_progress()
                    stop.check()
                    between_steps()
                    collect()
            self._journal.close()
            self._show_progress()
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            self._progress.close()
        for recorder in self._engine.recorders:
            recorder.on_end()

    def _show_progress(self) -> None:
        self._progress.update(
            self._generations.num_flushed + self._failures.num_flushed,
            self._figures.num_sampled_tokens,
            self._failures.num_flushed,
            self._figures.num_steps,
            self._seconds_left,
        )

    def _seconds_left(self, pace: Pace) -> float | None:
        if self._num_rows is None:
            return None
        not_begun = max(0, self._num_rows - self._num_taken) + self._engine.num_waiting
        lengths = running_lengths(self._engine)
        return self._outlook.seconds_left(
            not_begun, lengths, tokens_per_s=pace.tokens_per_s, steps_per_s=pace.steps_per_s
        )

    def _while_waiting(self) -> None:
        """A pipe may be silent for hours; that is no hang."""
        if self._input_is_awaited():
            self._watchdog.beats += 1
        self._show_progress()

    def counts(self) -> dict[str, object]:
        """Acknowledged rows of all attempts: all of them, answered, failed, and these by code, the commonest first."""
        answered, failed = self._generations.num_flushed, self._failures.num_flushed
        return {
            "rows": answered + failed,
            "answered": answered,
            "failed": failed,
            "failed_by_code": dict(self._failures.codes.most_common()),
        }

    def _give_up(self, error: BaseException) -> None:
        """End what runs, so that the records say so; should that fail too, `error` is still the one that counts."""
        try:
            self._engine.abort_all()
        except Exception as second:
            error.add_note(f"and the running sequences could not be ended: {type(second).__name__}: {second}")

    def _feed(self, stop: StopRequest) -> bool:
        """Take rows in; whether there may be more."""

        def take() -> int | None:
            row = self._rows.take(self._in_step or not self._engine.has_work(), stop, self._while_waiting)
            if row is None:
                return None
            self._num_taken += 1
            if isinstance(row, BadRow):
                self._fail(row)
                return 0
            return self._take(row)

        take_rows(self._engine, take)
        return not self._rows.ended

    def _take(self, row: ReadyRow) -> int:
        """Tokens of the row's prompt."""
        self._intake.add(row.request)
        self._running[row.row] = row
        return len(row.request.token_ids)

    def _finish(self, output: SequenceOutput) -> None:
        row = self._running.pop(output.row)
        self._outlook.finished(len(output.token_ids))
        if output.finish_reason == "error":
            reason = f"the model's logits were not finite after {len(output.token_ids)} output tokens"
            self._fail(row.failed(PromptError("logits_not_finite", reason)))
            return
        line = self._generations.encode(
            Generation(
                row=row.row,
                sample=output.sample,
                id=row.id,
                text=self._intake.text(output),
                token_ids=output.token_ids,
                finish_reason=output.finish_reason,
                num_prompt_tokens=output.num_prompt_tokens,
                columns=row.columns,
                url=row.url,
            )
        )
        self._journal.append(self._generations, line, 1 + len(line) // VALUE_BYTES)

    def _fail(self, row: BadRow) -> None:
        self._num_failed += 1
        failure = self._failures.encode(row)
        self._journal.append(self._failures, failure, 1 + len(failure[1]) // VALUE_BYTES)
        if self._max_failures is not None and self._num_failed > self._max_failures:
            raise TooManyFailures(
                f"more than reader.max_failures={self._max_failures} rows failed; the last one is row {row.row} "
                f"({row.file}, line {row.line}): {row.reason}"
            )
