"""Where each line of a log of finished rows stands, and which row it belongs to."""

from pathlib import Path

import numpy as np

ENTRY = np.dtype([("row", np.uint32), ("sample", np.uint16), ("end", np.int64)])
"""A line: its row, its sample, and where it ends in the file; it begins where the one before it ends."""
CHUNK = 65536
"""Entries that are Python integers, or indices of 64 bits, at the same time: a million would take 36 MB."""


class RowLogError(RuntimeError):
    """A log holds what no crash of ours can have left."""


class LineIndex:
    """The lines of one log. Memory: 22 bytes a line, and 4 more while it is made.

    Rows are below 2^32, samples below 2^16.
    """

    def __init__(self, path: Path, entries: np.ndarray) -> None:
        """`entries`: ENTRY [lines], as they stand in the file `path`; RowLogError where a (row, sample) comes twice."""
        self._entries = entries
        samples = entries["sample"]
        # Of one sample a row, which is the rule, the order is found in less memory than lexsort takes.
        self.order = np.lexsort((samples, self.rows)) if samples.any() else np.argsort(self.rows)
        """int64 [lines]: their places in the file, by row and sample."""
        self._check(path)

    @property
    def rows(self) -> np.ndarray:
        """uint32 [lines], as they stand in the file."""
        return self._entries["row"]

    @property
    def num_rows(self) -> int:
        """Different ones."""
        return len(np.unique(self.rows))

    def bounds(self, place: int) -> tuple[int, int]:
        """The first byte of a line, and the one behind it."""
        ends = self._entries["end"]
        return int(ends[place - 1]) if place else 0, int(ends[place])

    def _check(self, path: Path) -> None:
        for first in range(0, len(self.order), CHUNK):
            places = self.order[first : first + CHUNK + 1]
            lines = self._entries[places]
            again = (np.diff(lines["row"]) == 0) & (np.diff(lines["sample"]) == 0)
            if again.any():
                line = lines[int(again.argmax())]
                raise RowLogError(f"{path}: row {line['row']}, sample {line['sample']} was written twice")
