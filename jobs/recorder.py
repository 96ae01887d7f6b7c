"""The flight recorder: every event of a run, in Parquet, written beside the step loop."""

from pathlib import Path
from typing import Self

from jobs.journal import FLUSH_S, MAX_PENDING, Journal, JournalError
from jobs.record_parts import read_records
from jobs.record_tables import RecordItem, RecordTables
from nanovllm.events import ArrivalEvent, BlockEvents, Recorder, RequestEvent, ScheduleEvent, StepEvent

__all__ = ["JournalError", "ParquetRecorder", "read_records"]

_OVERHEAD = 64
_PER_BLOCK_EVENT = 8


class ParquetRecorder(Recorder):
    """Hands every event to a journal, which writes them to the tables of a run's directory.

    Nothing is dropped: when too much waits for the journal, the step loop waits. When writing fails, the next call and
    `close` raise JournalError. The arrays of the events are kept, not copied; nobody may change them afterwards.
    """

    def __init__(self, journal: Journal, tables: RecordTables) -> None:
        """`tables` must be one of the journal's stages."""
        self.journal = journal
        self.tables = tables

    @classmethod
    def alone(
        cls,
        directory: Path,
        *,
        attempt: int = 0,
        replica: int = 0,
        flush_s: float = FLUSH_S,
        max_pending: int = MAX_PENDING,
    ) -> Self:
        """A recorder below `directory`, with a journal for its records and nothing else."""
        tables = RecordTables(directory / "records", attempt=attempt, replica=replica)
        return cls(Journal([tables], flush_s=flush_s, max_pending=max_pending), tables)

    def on_arrival(self, event: ArrivalEvent) -> None:
        self._append(event, _OVERHEAD + len(event.prompt_token_ids))

    def on_schedule(self, event: ScheduleEvent) -> None:
        events = event.block_events
        if events:
            self._append((event.plan.step, events), _PER_BLOCK_EVENT * len(events))

    def on_step(self, event: StepEvent) -> None:
        plan = event.schedule.plan
        num_values = len(plan.seq_ids) + len(plan.prefill_token_ids) + _PER_BLOCK_EVENT * len(event.block_events)
        self._append(event, _OVERHEAD + num_values)

    def on_request(self, event: RequestEvent) -> None:
        self._append(event, _OVERHEAD)

    def on_abort(self, step: int, block_events: BlockEvents) -> None:
        if block_events:
            self._append((step, block_events), _PER_BLOCK_EVENT * len(block_events))

    def close(self) -> None:
        """Closes the journal; everything is on disk when this returns. A second call does nothing more."""
        self.journal.close()

    def _append(self, item: RecordItem, num_values: int) -> None:
        self.journal.append(self.tables, item, num_values)
