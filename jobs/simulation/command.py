"""The words of the command line, and what is done with them."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from jobs.analysis.run_paths import find_run, find_runs
from jobs.simulation import report
from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.grid import search_words, span
from jobs.simulation.heap import keep_freed_memory
from jobs.simulation.predictor import Prediction, Predictor, compare_events
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.settings import KEYS
from jobs.simulation.workers import MOST_WORKERS, Workers, workers_for
from jobs.summary import show
from jobs.usage import UsageError
from nanovllm.quiet_gc import collector_kept_out

HELP = f"""python -m jobs.simulate run=DIR [key=value,value ...] [search=true]
python -m jobs.simulate run=DIR against=DIR [against=DIR ...]

Runs the rows of a recorded run through the real scheduler and block manager, with the time that each step would take
by a cost model fitted on the recorded steps. Makes no run directory and needs no GPU.

  run=      a run directory, taken as it stands
  key=      of a job's configuration, with commas between several values: {", ".join(KEYS)}
  search=   true: says which of the configurations is best; without any key, of some around the recorded one
  workers=  processes that simulate configurations side by side; by default one for each core, where that is faster
  against=  other runs (a directory, that of a sweep, or a glob) on the same device with the same model: their rows and
            settings are simulated with the costs of run=, and what comes out stands beside what was measured"""

_EXAMPLES = {"run": "DIR", "against": "DIR", "search": "true", "workers": "4"}


@dataclass(slots=True)
class _Words:
    run: str = ""
    against: list[str] = field(default_factory=list)
    search: bool = False
    workers: int | None = None
    grid: list[str] = field(default_factory=list)


def run(words: Sequence[str]) -> int:
    """Prints fit and predictions; UsageError for what its user can cure."""
    if {"--help", "-h"} & set(words):
        show(HELP)
        return 0
    said = _parse(words)
    keep_freed_memory()
    recorded = RecordedRun("run", find_run("run", said.run))
    with collector_kept_out():  # it would look through every row again and again
        if said.against:
            _against(Predictor(recorded), said.against)
        else:
            _grid(recorded, said)
    return 0


def _parse(words: Sequence[str]) -> _Words:
    said = _Words()
    for word in words:
        key, equals, value = word.partition("=")
        if key in _EXAMPLES and not value:
            raise UsageError(f"{word}: has no value; write {key}={_EXAMPLES[key]}")
        if key == "run":
            if said.run:
                raise UsageError(f"{word}: one run is simulated, and run={said.run} is named already")
            said.run = value
        elif key == "against":
            said.against.append(value)
        elif key == "search":
            if value not in ("true", "false"):
                raise UsageError(f"{word}: must be true or false")
            said.search = value == "true"
        elif key == "workers":
            if not value.isdecimal() or not 1 <= int(value) <= MOST_WORKERS:
                raise UsageError(f"{word}: must be a number of processes, 1 to {MOST_WORKERS}")
            said.workers = int(value)
        elif not equals:
            raise UsageError(f"{word}: not a word of this command; write key=value, or --help")
        else:
            said.grid.append(word)
    if not said.run:
        raise UsageError("run=DIR is missing: the directory of the run to simulate")
    if said.against and (said.grid or said.search or said.workers):
        word = (*said.grid, *(["search=true"] if said.search else []), f"workers={said.workers}")[0]
        raise UsageError(f"{word}: has no place beside against=, whose runs say it all")
    return said


def _grid(recorded: RecordedRun, said: _Words) -> None:
    words = said.grid or (search_words(recorded.facts.settings) if said.search else [])
    most_len = recorded.facts.engine.get("architecture", {}).get("max_position_embeddings")
    choices = span(words, recorded.facts.settings, most_len) if words else []
    settings = [choice.settings for choice in choices if choice.settings is not None]
    sizes = {"num_rows": recorded.requests.num_rows, "num_steps": recorded.steps.num_rows}
    count = min(said.workers or workers_for(len(settings), **sizes), len(settings))
    with Workers(count) if count > 1 else nullcontext() as workers:
        predictor = Predictor(recorded)
        show("\n".join([*report.fit_lines(predictor), *_rows_lines(predictor), ""]))
        began = time.perf_counter()
        simulated = iter(predictor.predict_all(settings, workers))
        seconds = time.perf_counter() - began
    predictions = [None if choice.settings is None else next(simulated) for choice in choices]
    lines = report.grid_table(predictor, choices, predictions)
    lines.append(f"block events with the recorded settings: {_compared(recorded, predictor.ledger)}")
    if choices:
        lines.append(_speed([prediction for prediction in predictions if prediction], seconds))
    if said.search:
        lines += report.best_lines(choices, predictions, predictor.recorded)
    show("\n".join(lines))


def _against(predictor: Predictor, patterns: Sequence[str]) -> None:
    runs = [RecordedRun("against", path) for pattern in patterns for path in find_runs("against", pattern)]
    show("\n".join([*report.fit_lines(predictor), ""]))
    predictions, events, seconds = [], [], 0.0
    for other in runs:
        rows, ledger = read_rows(other).rows, BlockLedger()
        began = time.perf_counter()
        predictions.append(predictor.predict_run(other, rows, ledger))
        seconds += time.perf_counter() - began
        events.append(_compared(other, ledger))
    lines = report.against_table(runs, predictions, events)
    lines.append(_speed(predictions, seconds))
    show("\n".join(lines))


def _speed(predictions: Sequence[Prediction], seconds: float) -> str:
    """How long they took, beside what they predict: the steps alone, and the whole jobs."""
    steps_s, job_s = sum(p.steps_s for p in predictions), sum(p.job_s for p in predictions)
    return (
        f"{len(predictions)} simulated in {seconds:.2f} s, {steps_s / max(seconds, 1e-9):.0f} times faster than their "
        f"steps, {job_s / max(seconds, 1e-9):.0f} times faster than the jobs"
    )


def _compared(run: RecordedRun, ledger: BlockLedger) -> str:
    if run.why_not_compared is not None:
        return f"not compared ({run.why_not_compared})"
    difference = compare_events(run, ledger)
    return f"identical ({len(ledger.columns()['step']):,})" if difference is None else f"differ at {difference}"


def _rows_lines(predictor: Predictor) -> list[str]:
    rows, read = predictor.rows, predictor.read
    lines = [f"{len(rows):,} rows, {int(rows.num_output_tokens.sum()):,} output tokens"]
    if predictor.run.num_unrecorded_attempts:
        lines.append("  note: rows of attempts with recorder=off are left out")
    if read.num_left_out:
        lines.append(f"  note: {read.num_left_out:,} rows never ended and are left out")
    if read.num_known_outputs < len(rows):
        missing = len(rows) - read.num_known_outputs
        lines.append(f"  note: of {missing:,} rows the output tokens are gone; prefixes that they share are not seen")
    return lines
