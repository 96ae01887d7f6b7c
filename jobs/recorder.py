"""The flight recorder: every event of a run, in Parquet, written beside the step loop."""

import math
import threading
import time
from pathlib import Path

import pyarrow as pa

from jobs.record_encoding import encode_block_events, encode_requests, encode_steps
from jobs.record_parts import PartWriter, read_records
from jobs.record_schemas import TABLES
from jobs.shared_prefix import NO_SHARED_PREFIX, SharedPrefix, SharedPrefixIndex
from nanovllm.events import ArrivalEvent, BlockEvents, Recorder, RequestEvent, ScheduleEvent, StepEvent

__all__ = ["ParquetRecorder", "RecorderError", "read_records"]

# Bounds on what waits count values: a sequence of a step, a token of a prompt; some 30 bytes each at most.
MAX_PENDING = 2**21
"""Values that wait for the writer before the engine waits too: up to 60 MB."""
WAKE_AT = 2**16
"""Values that are worth a turn of the writer: about 160 decode steps of 256 sequences."""
# The step loop may have to wait for the interpreter while the writer's thread is at it: a go should take about 1 ms.
ITEMS_AT_ONCE = 64
"""Items that are taken over, and steps or requests that are encoded, in one go."""
BLOCK_EVENTS_AT_ONCE = 2**15
"""Block events that are encoded in one go."""
PAUSE_S = 0.0005
"""Between two goes, so that the step loop gets the interpreter at once and not after its switch interval."""
MAX_UNWRITTEN_BYTES = 2**25
"""Taken over and not yet on disk; beyond this a part is written early."""

_OVERHEAD = 64
_STEP_BYTES, _ROW_BYTES, _REQUEST_BYTES = 256, 32, 256
_PER_BLOCK_EVENT = 8

_StepBlockEvents = tuple[int, BlockEvents]
_Item = StepEvent | ArrivalEvent | RequestEvent | _StepBlockEvents


class RecorderError(RuntimeError):
    """Records could not be written; the cause says why."""


class ParquetRecorder(Recorder):
    """Writes `records/{steps,block_events,requests}/*.parquet` below a run's directory.

    The step loop only appends events to a list; a thread encodes and writes them. Every `flush_s` seconds what has
    come is written as closed parts, so a killed process loses at most that much. Tables are written in the order of
    `record_schemas.TABLES`: every step on disk has all its block events there, every request all its steps.

    Nothing is dropped: when more than `max_pending` values wait for the writer, the step loop waits. When the writer
    fails, the next call and `close` raise RecorderError. Call `close`, also when the run fails: the thread does not
    keep the process alive, and what it has not written by then is lost.

    The arrays of the events are kept, not copied; nobody may change them afterwards.
    """

    def __init__(
        self,
        directory: Path,
        *,
        attempt: int = 0,
        replica: int = 0,
        flush_s: float = 5.0,
        max_pending: int = MAX_PENDING,
    ) -> None:
        if not (0.0 < flush_s < math.inf):
            raise ValueError(f"recorder.flush_s={flush_s}: must be a number of seconds above 0")
        self._tables = _Tables(directory / "records", replica=replica, attempt=attempt)
        self._flush_s = flush_s
        self._max_pending = max_pending
        self._changed = threading.Condition(threading.Lock())
        self._pending: list[_Item] = []
        self._num_pending = 0
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flight-recorder", daemon=True)
        self._thread.start()

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
        """Write what is left and stop; everything is on disk when this returns. A second call does nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_error()

    # Called by the step loop

    def _append(self, item: _Item, num_values: int) -> None:
        with self._changed:
            while self._num_pending >= self._max_pending and self._error is None:
                self._changed.wait()
            self._raise_error()
            if self._is_closed:
                raise ValueError("the flight recorder is closed; no events can follow")
            self._pending.append(item)
            self._num_pending += num_values
            if self._num_pending >= self._wake_at:
                self._changed.notify()

    @property
    def _wake_at(self) -> int:
        return min(WAKE_AT, self._max_pending)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RecorderError(f"the flight recorder could not write its records: {self._error}") from self._error

    # In the writer's thread

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except BaseException as error:  # raised again in the step loop
            with self._changed:
                self._error = error
                self._pending = []
                self._changed.notify_all()

    def _write_until_closed(self) -> None:
        deadline = time.monotonic() + self._flush_s
        is_last = False
        while not is_last:
            items, is_last = self._take(deadline)
            for start in range(0, len(items), ITEMS_AT_ONCE):
                self._tables.add(items[start : start + ITEMS_AT_ONCE])
                time.sleep(PAUSE_S)
                if self._tables.num_bytes >= MAX_UNWRITTEN_BYTES:
                    self._tables.flush()
            if is_last or time.monotonic() >= deadline:
                deadline = time.monotonic() + self._flush_s
                self._tables.flush()

    def _take(self, deadline: float) -> tuple[list[_Item], bool]:
        """What has come, once it is worth a turn or the deadline is there; and whether nothing more will come."""
        with self._changed:
            while not self._is_closed and self._num_pending < self._wake_at:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    break
                self._changed.wait(remaining_s)
            items, self._pending, self._num_pending = self._pending, [], 0
            self._changed.notify()
            return items, self._is_closed


class _Tables:
    """Rows of the three tables until they are written; used by one thread at a time.

    A go of encoding costs some 0.1 ms whatever it encodes, so it waits until there is enough of a kind, or until what
    there is shall be written.
    """

    def __init__(self, records: Path, *, replica: int, attempt: int) -> None:
        self.num_bytes = 0
        """Not yet written, about."""
        self._origin = {"replica": replica, "attempt": attempt}
        self._shared_prefixes = SharedPrefixIndex()
        self._shared_by_seq_id: dict[int, SharedPrefix] = {}
        self._steps: list[StepEvent] = []
        self._blocks: list[_StepBlockEvents] = []
        self._num_block_events = 0
        self._requests: list[tuple[RequestEvent, SharedPrefix]] = []
        self._batches: dict[str, list[pa.RecordBatch]] = {table: [] for table in TABLES}
        self._writers = {table: PartWriter(records, table, **self._origin) for table in TABLES}
        for writer in self._writers.values():
            writer.write([])  # the table opens from the first instant on, whatever happens next

    def add(self, items: list[_Item]) -> None:
        """Take over items in the order in which they happened."""
        for item in items:
            if isinstance(item, StepEvent):
                self._steps.append(item)
                self.num_bytes += _num_bytes(item)
                self._add_block_events(item.schedule.plan.step, item.block_events)
            elif isinstance(item, RequestEvent):
                self._requests.append((item, self._shared_by_seq_id.pop(item.seq_id, NO_SHARED_PREFIX)))
                self.num_bytes += _REQUEST_BYTES
            elif isinstance(item, ArrivalEvent):
                self._shared_by_seq_id[item.seq_id] = self._shared_prefixes.add(item.row, item.prompt_token_ids)
            else:
                self._add_block_events(*item)
        if len(self._steps) >= ITEMS_AT_ONCE:
            self._encode_steps()
        if len(self._requests) >= ITEMS_AT_ONCE:
            self._encode_requests()
        if self._num_block_events >= BLOCK_EVENTS_AT_ONCE:
            self._encode_block_events()

    def flush(self) -> None:
        """Encode what is left and write what there is."""
        self.encode()
        self.write()

    def encode(self) -> None:
        self._encode_block_events()
        self._encode_steps()
        self._encode_requests()

    def write(self) -> None:
        """A part for each table that has encoded rows."""
        for table, batches in self._batches.items():
            if batches:
                self._writers[table].write(batches)
                self._batches[table] = []
        self.num_bytes = 0

    def _add_block_events(self, step: int, events: BlockEvents) -> None:
        if events:
            self._blocks.append((step, events))
            self._num_block_events += len(events)
            self.num_bytes += events.rows.nbytes

    def _encode_steps(self) -> None:
        if self._steps:
            self._batches["steps"].append(encode_steps(self._steps, **self._origin))
            self._steps = []

    def _encode_block_events(self) -> None:
        if self._blocks:
            self._batches["block_events"].append(encode_block_events(self._blocks, **self._origin))
            self._blocks, self._num_block_events = [], 0

    def _encode_requests(self) -> None:
        if self._requests:
            self._batches["requests"].append(encode_requests(self._requests, **self._origin))
            self._requests = []


def _num_bytes(event: StepEvent) -> int:
    """About what a step takes, encoded or not, without its block events."""
    plan = event.schedule.plan
    return _STEP_BYTES + _ROW_BYTES * len(plan.seq_ids) + plan.prefill_token_ids.nbytes
