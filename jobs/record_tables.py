"""The flight recorder's rows until they are written: taken over as events, encoded, and written as parts."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from jobs.record_encoding import encode_block_events, encode_requests, encode_steps
from jobs.record_parts import PartWriter
from jobs.record_schemas import TABLES
from jobs.shared_prefix import NO_SHARED_PREFIX, SharedPrefix, SharedPrefixIndex
from nanovllm.events import ArrivalEvent, BlockEvents, RequestEvent, StepEvent

# The step loop may have to wait for the interpreter while the journal's thread is at it: a go should take about 1 ms.
ITEMS_AT_ONCE = 64
"""Steps or requests that are encoded in one go."""
BLOCK_EVENTS_AT_ONCE = 2**15
"""Block events that are encoded in one go."""

_STEP_BYTES, _ROW_BYTES, _REQUEST_BYTES = 256, 32, 256

StepBlockEvents = tuple[int, BlockEvents]
RecordItem = StepEvent | ArrivalEvent | RequestEvent | StepBlockEvents


class RecordTables:
    """Rows of `records/{steps,block_events,requests}/*.parquet` until they are written; used by one thread at a time.

    Tables are written in the order of `record_schemas.TABLES`: every step on disk has all its block events there, every
    request all its steps.

    A go of encoding costs some 0.1 ms whatever it encodes, so it waits until there is enough of a kind, or until what
    there is shall be written.
    """

    def __init__(self, records: Path, *, replica: int = 0, attempt: int = 0, durable: bool = True) -> None:
        self.num_bytes = 0
        """Not yet written, about."""
        self._origin = {"replica": replica, "attempt": attempt}
        self._shared_prefixes = SharedPrefixIndex()
        self._shared_by_seq_id: dict[int, SharedPrefix] = {}
        self._steps: list[StepEvent] = []
        self._blocks: list[StepBlockEvents] = []
        self._num_block_events = 0
        self._requests: list[tuple[RequestEvent, SharedPrefix]] = []
        self._batches: dict[str, list[pa.RecordBatch]] = {table: [] for table in TABLES}
        self._writers = {table: PartWriter(records, table, **self._origin, durable=durable) for table in TABLES}
        for writer in self._writers.values():
            writer.write([])  # the table opens from the first instant on, whatever happens next

    def add(self, items: Sequence[RecordItem]) -> None:
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
