"""Laws of the whole run: steps without gaps, and every input row answered exactly once."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jobs.analysis import tables
from jobs.analysis.answers import Answers, failures, read_answers
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.violation import Violation

ANSWERED = ("stop", "length")
"""finish_reason of a request that becomes a row of the generations."""


def step_number_violations(run: RecordedRun) -> Iterator[Violation]:
    """Steps count from 0 without gaps, over attempts too, but for the steps of attempts that were not recorded."""
    replicas, steps = run.step_column("replica"), run.step_column("step")
    attempts = run.step_column("attempt")
    for replica in np.unique(replicas):
        here = np.flatnonzero(replicas == replica)
        expected = _expected_steps(run, attempts[here])
        wrong = np.flatnonzero(steps[here] != expected)
        if len(wrong):
            at = here[wrong[0]]
            yield Violation(
                law="step numbers have a gap",
                detail=f"step {steps[at]} follows on {expected[wrong[0]]} steps",
                replica=int(replica),
                attempt=int(attempts[at]),
                step=int(steps[at]),
            )
    seq_ids = tables.ints(run.requests, "seq_id")
    unique, count = np.unique(np.stack([tables.ints(run.requests, "replica"), seq_ids]), axis=1, return_counts=True)
    if (count > 1).any():
        replica, seq_id = unique[:, np.flatnonzero(count > 1)[0]]
        yield Violation(
            law="a seq_id is used twice", detail="two requests have it", replica=int(replica), seq_id=int(seq_id)
        )


def _expected_steps(run: RecordedRun, attempts: np.ndarray) -> np.ndarray:
    """The numbers that the steps of one replica must have, whose attempts these are."""
    expected = np.arange(len(attempts))
    for attempt in run.attempts:
        later = np.flatnonzero(attempts > attempt.number)
        if not attempt.is_recorded and len(later):
            first = later[0]
            expected[first:] += max(attempt.last_step + 1 - expected[first], 0)
    return expected


def row_violations(run: RecordedRun) -> Iterator[Violation]:
    """Each row is answered once or has failed once, as its request says."""
    answers, failed = read_answers(run.path), [failure["row"] for failure in failures(run.path)]
    keys = list(zip(answers.row.tolist(), answers.sample.tolist(), strict=True))
    for (row, sample), count in Counter(keys).items():
        if count > 1:
            yield _of_row("a row is answered more than once", row, sample, f"{count} times in {_name(answers)}")
    twice = [row for row, count in Counter(failed).items() if count > 1]
    both = sorted({row for row, _ in keys} & set(failed))
    for law, rows in (("a row fails more than once", twice), ("a row is answered and has failed", both)):
        if rows:
            yield _of_row(law, rows[0], None, f"{len(rows)} such rows")
    different = np.flatnonzero(answers.num_token_ids != answers.num_output_tokens)
    if len(different):
        row, sample = keys[different[0]]
        yield _of_row("num_output_tokens is not the number of token_ids", row, sample, _name(answers))
    if run.is_complete:
        yield from _missing_rows(run, {row for row, _ in keys} | set(failed))
    if run.requests.num_rows:
        yield from _answers_of_requests(run, answers, set(failed))


def _missing_rows(run: RecordedRun, rows: set[int]) -> Iterator[Violation]:
    expected = (run.manifest.get("counts") or {}).get("rows")
    if expected is None:
        return
    missing = sorted(set(range(expected)) - rows)
    extra = sorted(rows - set(range(expected)))
    if missing:
        yield _of_row("a row is missing", missing[0], None, f"{len(missing)} of {expected} rows have no result")
    if extra:
        yield _of_row("a row is not one of the run's", extra[0], None, f"the manifest counts {expected} rows")


def _answers_of_requests(run: RecordedRun, answers: Answers, failed: set[int]) -> Iterator[Violation]:
    """Each answer is that of a recorded request, and each request that ended has its answer.

    A killed attempt may lack either: its last rows' requests, or an answer that never was on disk. One that was not
    recorded has no requests at all.
    """
    found = requests_by_row(run)
    for requests in found.values():
        yield from _computed_twice(requests)
    incomplete = [attempt.number for attempt in run.attempts if not (attempt.is_sealed and attempt.is_recorded)]
    last_incomplete = max(incomplete, default=-1)
    answered = set()
    columns = (answers.num_prompt_tokens, answers.num_output_tokens)
    keys = zip(answers.row.tolist(), answers.sample.tolist(), strict=True)
    for key, numbers, reason in zip(keys, zip(*columns, strict=True), answers.finish_reason, strict=True):
        answered.add(key)
        requests = found.get(key, [])
        last = max((request.attempt for request in requests), default=-1)
        answer = (int(numbers[0]), int(numbers[1]), reason)
        if any(answer == request.answer for request in requests) or last_incomplete > last:
            continue
        if not requests:
            yield _of_row("a row has no request", *key, f"{_name(answers)} has it, the records do not")
            continue
        detail = f"{_name(answers)} has {answer}, the records {requests[-1].answer}"
        yield _of_row("a row's tokens are not its request's", *key, detail, requests[-1].seq_id)
    sealed = {attempt.number for attempt in run.attempts if attempt.is_sealed}
    for (row, sample), requests in found.items():
        if (row, sample) not in answered and row not in failed and any(r.attempt in sealed for r in requests):
            yield _of_row("a request's row is missing", row, sample, f"not in {_name(answers)}", requests[-1].seq_id)


class _Request(NamedTuple):
    attempt: int
    seq_id: int
    row: int
    sample: int
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str

    @property
    def answer(self) -> tuple[int, int, str]:
        return self.num_prompt_tokens, self.num_output_tokens, self.finish_reason


def requests_by_row(run: RecordedRun) -> dict[tuple[int, int], list[_Request]]:
    """Requests that became a row of the generations, by (row, sample), in the order in which they ended."""
    columns = [run.requests[name].to_pylist() for name in _Request._fields]
    found: dict[tuple[int, int], list[_Request]] = {}
    for request in map(_Request, *columns):
        if request.finish_reason in ANSWERED:
            found.setdefault((request.row, request.sample), []).append(request)
    return found


def _computed_twice(requests: list[_Request]) -> Iterator[Violation]:
    attempts = [request.attempt for request in requests]
    if len(set(attempts)) < len(attempts):
        row, sample, seq_id = requests[-1].row, requests[-1].sample, requests[-1].seq_id
        yield _of_row("a row is computed twice", row, sample, f"{len(attempts)} requests of one attempt", seq_id)


def _name(answers: Answers) -> str:
    return "no generations file" if answers.path is None else answers.path.name


def _of_row(law: str, row: int, sample: int | None, detail: str, seq_id: int | None = None) -> Violation:
    named = f"row {row}" if sample is None else f"row {row}, sample {sample}"
    return Violation(law=law, detail=f"{named}: {detail}", seq_id=seq_id)
