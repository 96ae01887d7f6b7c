"""One job for each combination of swept values, each in a process of its own."""

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from hydra.core.override_parser.types import Override

from jobs import complaints
from jobs.command import EXIT_COMPLETE, Command, ConfigT, is_dry_run, prepare
from jobs.command_line import CommandLine
from jobs.compose import ConfigSource, SweepPlan, plan_sweep
from jobs.masking import Masker
from jobs.run_dir import make_free
from jobs.stop import Stopped, StopRequest
from jobs.sweep_job import Job, JobRun
from jobs.usage import UsageError


def sweep(command: Command[ConfigT], source: ConfigSource[ConfigT], line: CommandLine, stop: StopRequest) -> int:
    """Runs every job, whatever happens to the others, and returns the first exit code that is not 0.

    UsageError, and no directory, where not one of the jobs could begin. A signal is passed on to the job that is
    running; when that job has ended, so has the sweep.
    """
    plan = plan_sweep(source, line.overrides)
    jobs = list(expand(plan.overrides))
    _check_any_can_begin(command, source, jobs)
    directory = _sweep_directory(plan)
    print(f"sweep: {len(jobs)} jobs in {os.path.relpath(directory)}", flush=True)
    codes = []
    for number, job in enumerate(jobs, start=1):
        label = f"sweep: job {number} of {len(jobs)}"
        path = make_free(directory / job.directory_name(Masker(os.environ)))[-1]
        print(f"{label}: {f'{job.title} ' if job.swept else ''}in {os.path.relpath(path)}", flush=True)
        job_run = JobRun(label=label, module=command.module, flags=line.config_flags, job=job, path=path)
        codes.append(job_run.run(partial(_check_job, command, source, job), stop))
        if stop.signum is not None:
            raise Stopped(stop.signum)
    print(f"sweep: exit codes {' '.join(map(str, codes))}", flush=True)
    return next((code for code in codes if code != EXIT_COMPLETE), EXIT_COMPLETE)


def expand(overrides: Sequence[Override]) -> Iterator[Job]:
    """Every combination, the last sweep changing fastest; the last of several overrides of a key counts."""
    by_key: dict[str, list[str]] = {}
    swept: set[str] = set()
    for override in overrides:
        key = override.get_key_element()
        swept.discard(key)
        by_key[key] = _words(override)
        if override.is_sweep_override():
            swept.add(key)
    for words in itertools.product(*by_key.values()):
        yield Job(overrides=list(words), swept=[w for key, w in zip(by_key, words, strict=True) if key in swept])


def _words(override: Override) -> list[str]:
    """The override for each of its values; one that is no sweep stays as it was typed."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise UsageError(
            f"{complaints.shown(override)}: an interval cannot be swept; list its values, or range(a,b,step)"
        )
    words = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not words:
        raise UsageError(f"{complaints.shown(override)}: names no value")
    return words


def _check_any_can_begin(command: Command[ConfigT], source: ConfigSource[ConfigT], jobs: Sequence[Job]) -> None:
    """A mistake that all jobs share ends the sweep before it begins; the first one's complaint stands for all."""
    first_complaint: UsageError | None = None
    for job in jobs:
        try:
            _check_job(command, source, job)
            return
        except UsageError as error:
            first_complaint = first_complaint or error
    if first_complaint is not None:
        raise first_complaint


def _check_job(command: Command[ConfigT], source: ConfigSource[ConfigT], job: Job) -> dict[str, object]:
    """The job's configuration for a manifest; UsageError where the job cannot begin."""
    composition = prepare(command, source, job.overrides)
    if is_dry_run(composition.config):
        raise UsageError("dry_run=true: is for one run; leave -m out")
    if composition.config.reads_standard_input:
        raise UsageError("input=-: a sweep cannot read standard input, which can be read only once; name a file")
    return Masker(os.environ).resolved(composition.tree)


def _sweep_directory(plan: SweepPlan) -> Path:
    try:
        if plan.sweep_dir_chosen:
            plan.sweep_dir.mkdir(parents=True, exist_ok=True)
            if any(plan.sweep_dir.iterdir()):
                raise UsageError(f"hydra.sweep.dir={plan.sweep_dir}: is not empty; choose another directory")
            return plan.sweep_dir
        return make_free(plan.sweep_dir)[-1]
    except OSError as error:
        raise UsageError(f"hydra.sweep.dir={plan.sweep_dir}: cannot be used for a sweep: {error}") from error
