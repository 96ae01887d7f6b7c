"""Replays a run's records and finds the first thing in them that cannot be."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.analysis.ledger import Ledger
from jobs.analysis.program import EXIT_DONE, EXIT_FOUND, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.row_laws import row_violations, step_number_violations
from jobs.analysis.run_paths import open_runs
from jobs.analysis.segments import Segment, segments
from jobs.analysis.step_laws import StepLaws
from jobs.analysis.terminal import show
from jobs.analysis.violation import Violation


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was looked at, and what was wrong."""

    run: Path
    num_steps: int
    num_block_events: int
    num_requests: int
    num_attempts: int
    seconds: float
    note: str | None
    """What the records do not have, so that no law was about it."""
    violations: list[Violation]
    """By place; the first of each law and attempt."""

    @property
    def first(self) -> Violation | None:
        return self.violations[0] if self.violations else None

    def __str__(self) -> str:
        looked_at = (
            f"{self.num_steps:,} steps, {self.num_block_events:,} block events and {self.num_requests:,} requests "
            f"of {self.num_attempts} attempt{'s' if self.num_attempts != 1 else ''} in {self.seconds:.1f} s"
        )
        looked_at += f"\n  {self.note}" if self.note else ""
        if self.first is None:
            return f"{self.run}: sound: {looked_at}"
        others = f" ({len(self.violations) - 1} more follow)" if len(self.violations) > 1 else ""
        return f"{self.run}: VIOLATION{others} in {looked_at}\n  {self.first}"


def audit(path: Path) -> Audit:
    """Checks one run directory; UsageError where there is nothing to check."""
    start = time.monotonic()
    run = RecordedRun(path)
    run.require_records()
    violations = sorted(_violations(run), key=lambda violation: violation.place)
    return Audit(
        run=path,
        num_steps=run.steps.num_rows,
        num_block_events=run.block_events.num_rows,
        num_requests=run.requests.num_rows,
        num_attempts=len(run.attempts),
        seconds=time.monotonic() - start,
        note=run.note_on_unrecorded,
        violations=violations,
    )


def _violations(run: RecordedRun) -> Iterator[Violation]:
    yield from step_number_violations(run)
    for segment in segments(run):
        yield from _of_segment(segment)
    yield from row_violations(run)


def _of_segment(segment: Segment) -> Iterator[Violation]:
    ledger = segment.ledger
    if ledger is not None:
        yield from ledger.violations(segment.replica, segment.attempt.number)
        yield from _left_over(segment, ledger)
    yield from StepLaws(segment).violations()


def _left_over(segment: Segment, ledger: Ledger) -> Iterator[Violation]:
    """An attempt that ended by itself has given every block back."""
    if not segment.attempt.is_sealed or not len(segment.events) or ledger.free_blocks[-1] == ledger.num_blocks:
        return
    events = segment.events
    last = len(events) - 1
    yield Violation(
        law="blocks are in use at the end",
        detail=f"{ledger.num_blocks - ledger.free_blocks[-1]} of {ledger.num_blocks} were never given back",
        replica=segment.replica,
        attempt=segment.attempt.number,
        step=int(events.step[last]),
        event=last + 1,
    )


def _run(values: Mapping[str, str]) -> int:
    code = EXIT_DONE
    for run in open_runs("run", values["run"]):
        found = audit(run.path)
        show(str(found).splitlines())
        code = code if found.first is None else EXIT_FOUND
    return code


ANALYSIS = Analysis(
    about="Replays every block event and compares steps, requests and rows; exit code 1 with the first violation.",
    keys={"run": "a run directory, the directory of a sweep, or a glob of these"},
    required=["run"],
    run=_run,
)
