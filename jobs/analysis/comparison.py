"""Two runs side by side: where their schedules part, where their answers do, what was set and what came out."""

from collections.abc import Iterator

import numpy as np

from jobs.analysis.answers import read_tokens
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.segments import Segment, segments
from jobs.analysis.sweep_screen import config_deltas

MOST_ROWS = 10
"""Rows that are named one by one."""
SEQUENCE_COLUMNS = ("seq_id", "num_tokens", "context_len", "cached_tokens", "sampled")


class Comparison:
    """`lines` says it; afterwards `same` is whether schedule and answers are equal."""

    def __init__(self, a: RecordedRun, b: RecordedRun) -> None:
        self._a, self._b = a, b
        self.same = True

    def lines(self) -> Iterator[str]:
        for name, run in (("a", self._a), ("b", self._b)):
            yield f"{name}  {run.path}  {run.status}"
            if run.note_on_unrecorded:
                yield f"   {run.note_on_unrecorded}"
        deltas = config_deltas([self._a, self._b])
        yield ""
        yield "configuration" if deltas else "the configurations are the same"
        for key, (of_a, of_b) in deltas.items():
            yield f"  {key}: {_shown(of_a)} -> {_shown(of_b)}"
        versions = self._versions()
        if versions:
            yield f"  versions: {versions}"
        yield ""
        yield from self._schedules()
        yield from self._answers()
        yield ""
        yield from self._figures()

    def _versions(self) -> str:
        of_a, of_b = (run.manifest.get("versions") or {} for run in (self._a, self._b))
        names = [name for name in dict.fromkeys([*of_a, *of_b]) if of_a.get(name) != of_b.get(name)]
        return ", ".join(f"{name} {of_a.get(name)} -> {of_b.get(name)}" for name in names)

    def _schedules(self) -> Iterator[str]:
        """The first step in which different rows run, or other tokens of them, or other blocks change hands."""
        pairs = list(zip(segments(self._a), segments(self._b), strict=False))
        for of_a, of_b in pairs:
            where = f"attempt {of_a.attempt.number}, " if len(pairs) > 1 else ""
            if of_a.attempt.is_recorded != of_b.attempt.is_recorded:
                self.same = False
                yield f"schedule: {where}is recorded in {'a' if of_a.attempt.is_recorded else 'b'} alone"
                return
            difference = _first_schedule_difference(of_a, of_b)
            if difference is not None:
                self.same = False
                yield f"schedule: {where}differs from {difference}"
                return
        count = sum(segment.num_steps for segment, _ in pairs)
        if self._a.steps.num_rows != self._b.steps.num_rows:
            self.same = False
            more = f"a has {self._a.steps.num_rows:,}, b {self._b.steps.num_rows:,}"
            yield f"schedule: the same for the first {count:,} steps; {more}"
            return
        blocks = _first_block_difference(self._a, self._b)
        yield f"schedule: the same in all {count:,} steps; {blocks or 'so are all block events'}"

    def _answers(self) -> Iterator[str]:
        of_a, of_b = read_tokens(self._a.path), read_tokens(self._b.path)
        both = sorted(of_a.keys() & of_b.keys())
        different = [key for key in both if of_a[key] != of_b[key]]
        self.same &= not different and of_a.keys() == of_b.keys()
        yield f"answers: {len(both) - len(different):,} of {len(both):,} rows have the same tokens"
        for only, others, name in ((of_a, of_b, "a"), (of_b, of_a, "b")):
            missing = sorted(only.keys() - others.keys())
            if missing:
                yield f"  {len(missing):,} rows are in {name} alone, from row {missing[0][0]}"
        for row, sample in different[:MOST_ROWS]:
            yield f"  row {row}, sample {sample}: {_first_token_difference(of_a[row, sample], of_b[row, sample])}"
        if len(different) > MOST_ROWS:
            yield f"  ... and {len(different) - MOST_ROWS:,} more"

    def _figures(self) -> Iterator[str]:
        of_a, of_b = (RunFigures.of(run).facts() for run in (self._a, self._b))
        yield f"{'':16s}{'a':>14s}{'b':>14s}{'b / a':>9s}"
        for name, value in of_a.items():
            other = of_b[name]
            ratio = f"{other / value:8.3f}" if value and value == value and other == other else f"{'-':>8s}"
            yield f"{name:16s}{_number(value):>14s}{_number(other):>14s} {ratio}"


def _first_schedule_difference(a: Segment, b: Segment) -> str | None:
    count = min(a.num_steps, b.num_steps)
    flat_a, flat_b = a.sequences, b.sequences
    size_a = np.bincount(flat_a.step_row, minlength=a.num_steps)[:count]
    size_b = np.bincount(flat_b.step_row, minlength=b.num_steps)[:count]
    sizes = np.flatnonzero(size_a != size_b)
    first = int(sizes[0]) if len(sizes) else count
    entries = int(size_a[:first].sum())
    found: tuple[int, str] | None = None
    for name in SEQUENCE_COLUMNS:
        wrong = np.flatnonzero(getattr(flat_a, name)[:entries] != getattr(flat_b, name)[:entries])
        if len(wrong):
            at = int(wrong[0])
            row = int(flat_a.step_row[at])
            if found is None or row < found[0]:
                values = getattr(flat_a, name)[at], getattr(flat_b, name)[at]
                found = row, f"{name} of seq_id {flat_a.seq_id[at]} is {values[0]} in a, {values[1]} in b"
    if found is None and first == count:
        return None
    row, what = found or (first, f"a runs {size_a[first]} sequences, b {size_b[first]}")
    return f"step {a.column('step')[row]}: {what}"


def _first_block_difference(a: RecordedRun, b: RecordedRun) -> str | None:
    names = ["step", "event", "block_id", "seq_id", "reason", "ref_count", "block_hash", "free_blocks"]
    of_a, of_b = a.block_events.select(names), b.block_events.select(names)
    count = min(of_a.num_rows, of_b.num_rows)
    firsts = []
    for name in names:
        left, right = of_a[name].slice(0, count), of_b[name].slice(0, count)
        if not left.equals(right):
            wrong = next(i for i, (x, y) in enumerate(zip(left.to_pylist(), right.to_pylist(), strict=True)) if x != y)
            firsts.append((wrong, name))
    if firsts:
        at, name = min(firsts)
        step = of_a["step"][at].as_py()
        values = of_a[name][at].as_py(), of_b[name][at].as_py()
        return f"block events differ from step {step}, event {at}: {name} is {values[0]} in a, {values[1]} in b"
    if of_a.num_rows != of_b.num_rows:
        return f"a has {of_a.num_rows:,} block events, b {of_b.num_rows:,}"
    return None


def _first_token_difference(a: list[int], b: list[int]) -> str:
    count = min(len(a), len(b))
    at = next((i for i in range(count) if a[i] != b[i]), count)
    if at < count:
        return f"token {at} is {a[at]} in a, {b[at]} in b"
    return f"the same for {count} tokens; a has {len(a)}, b {len(b)}"


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
