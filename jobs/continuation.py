"""Where the numbers of a resumed run go on: steps and sequences are counted over all attempts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.manifest import Manifest, is_recorded

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_SEQ_ID_COLUMNS = {"steps": "seq_ids.list.element", "block_events": "seq_id", "requests": "seq_id"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """The numbers that no earlier attempt has used."""

    first_step: int = 0
    """Behind the last one that the records have: an attempt's later steps, which a kill or a full disk has kept from
    them, are as if they had not been."""
    first_seq_id: int = 0
    last_ns: int = 0
    """The latest reading of the run's clock that is known."""


def continuation(directory: Path, manifest: Manifest) -> Continuation:
    """From the records' footers, and from the manifest for the steps of attempts without records."""
    from jobs.record_parts import parts_of  # pyarrow: 0.2 s that a first attempt need not spend here

    step = seq_id = -1
    last_ns = 0
    for attempt in manifest["attempts"]:
        if not is_recorded(attempt, manifest.get("config")):
            step = max(step, attempt.get("last_step", -1))
        seq_id = max(seq_id, attempt.get("last_seq_id", -1))
        last_ns = max([last_ns, *(phase["end_ns"] for phase in attempt["phases"])])
    for table, seq_id_column in _SEQ_ID_COLUMNS.items():
        for metadata in parts_of(directory, table):
            seq_id = max(seq_id, _greatest(metadata, seq_id_column))
            if table == "steps":
                step = max(step, _greatest(metadata, "step"))
                last_ns = max(last_ns, _greatest(metadata, "end_ns"))
    return Continuation(first_step=step + 1, first_seq_id=seq_id + 1, last_ns=last_ns)


def _greatest(metadata: "pq.FileMetaData", column: str) -> int:
    """The column's greatest value by the footer; -1 without any."""
    names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    index = names.index(column)
    groups = [metadata.row_group(group).column(index).statistics for group in range(metadata.num_row_groups)]
    return max([-1, *(group.max for group in groups if group is not None and group.has_min_max)])
