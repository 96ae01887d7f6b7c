"""From a command line to a claimed run directory, and from the job's end to an exit code.

Hydra composes, but a run does not go through `hydra.main`: that creates directories before anything is validated,
reports errors as tracebacks and gives every failure the exit code 1.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import hydra

from jobs import command_line, schema
from jobs.clock import Clock
from jobs.command import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_ROWS_FAILED,
    EXIT_USAGE,
    Command,
    ConfigT,
    Run,
    check,
    complain,
    facts,
    is_dry_run,
    prepare,
)
from jobs.command_line import CommandLine
from jobs.compose import (
    HYDRA_VERSION_BASE,
    RUN_DIR,
    Composition,
    ConfigSource,
    check_composition,
    compose_config,
    given_value,
    register,
)
from jobs.continuation import Continuation, continuation
from jobs.manifest import COMPLETE, FAILED, INTERRUPTED, Manifest, remove_unfinished
from jobs.masking import Masker
from jobs.results import ResultsError
from jobs.resume import KEY, EarlierRun, Resuming, earlier_run
from jobs.run_dir import RUN_LOG, RunDirectory, append_to_log, claim, write_hydra_files
from jobs.run_lock import RunLock
from jobs.stop import Stopped, StopRequest
from jobs.sweep import sweep
from jobs.text_values import as_text
from jobs.usage import UsageError
from nanovllm.errors import ModelError
from nanovllm.logging.setup import close_job_logging, configure_job_logging

__all__ = ["Command", "Run", "UsageError", "launch"]

PRIVATE = 0o077
"""Prompts and answers may be private: what a run creates is readable by its owner alone."""


def launch(command: Command[ConfigT], words: Sequence[str] | None = None) -> int:
    """Runs the command with these words, or the process's own, and returns the exit code.

    0 all rows answered; 1 the run failed; 2 configuration, input or model directory error: one message, no
    traceback, no new directory; 3 complete but some rows failed; 130 interrupted, 143 terminated. Must be called in
    the main thread.
    """
    stop = StopRequest()
    umask = os.umask(PRIVATE)
    try:
        with stop.installed():
            line = command_line.parse(sys.argv[1:] if words is None else words)
            source = _source(command, line)
            if line.shows:
                return _show(command, source, line)
            resumed = _resumed_run(command, source, line)
            if resumed is not None:
                return _resume(command, source, line, stop, resumed)
            if line.multirun:
                return sweep(command, source, line, stop)
            return _run_one(command, source, line, stop)
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except ResultsError as error:  # of a run that was complete
        complain(str(error))
        return EXIT_FAILED
    except Stopped as stopped:
        complain(f"{stopped}: stopped")
        return stopped.exit_code
    finally:
        os.umask(umask)


def _source(command: Command[ConfigT], line: CommandLine) -> ConfigSource[ConfigT]:
    return ConfigSource(
        schema=command.schema,
        config_dir=command.config_dir,
        config_name=line.config_name or command.config_name,
        extra_dir=line.config_dir,
    )


def _resumed_run(command: Command[ConfigT], source: ConfigSource[ConfigT], line: CommandLine) -> str | None:
    """The directory that `resume=` names."""
    if KEY not in schema.keys(command.schema) or not any(KEY in word for word in line.overrides):
        return None
    given = given_value(source, line.overrides, KEY)
    if given is not None and line.multirun:
        raise UsageError(f"resume={given}: a sweep cannot be resumed; resume its jobs one by one, without -m")
    if given is not None and given_value(source, line.overrides, RUN_DIR) is not None:
        raise UsageError(f"{RUN_DIR}: has no effect with resume={given}, which goes on in that directory")
    return given


def _run_one(command: Command[ConfigT], source: ConfigSource[ConfigT], line: CommandLine, stop: StopRequest) -> int:
    composition = prepare(command, source, line.overrides)
    if command.rehearse is not None and is_dry_run(composition.config):
        return _rehearse(command.rehearse, composition.config, stop)
    masker = Masker(os.environ)
    clock = Clock()
    first_facts = facts(command.module, line.words, line.overrides, masker.resolved(composition.tree), masker)
    begun: list[tuple[RunLock, Manifest]] = []
    with stop.deferred():  # a directory is either claimed, locked and with its manifest, or not there
        directory = claim(
            composition.run_dir,
            composition.run_dir_chosen,
            lambda path: begun.append(_begin(path, clock, first_facts)),
        )
    lock, manifest = begun[-1]
    run = Run(directory=directory.path, manifest=manifest, clock=clock, numbers=Continuation(), stop=stop)
    try:
        return _until_its_end(command, composition, run, directory, masker)
    finally:
        lock.release()


def _rehearse(rehearse: Callable[[ConfigT, StopRequest], int], config: ConfigT, stop: StopRequest) -> int:
    try:
        return rehearse(config, stop)
    except (ModelError, OSError) as error:
        raise UsageError(str(error)) from error


def _begin(path: Path, clock: Clock, first_facts: dict[str, object]) -> tuple[RunLock, Manifest]:
    lock = RunLock(path)
    remove_unfinished(path)  # of a run that was killed before it had a manifest
    try:
        return lock, Manifest.create(path, clock, first_facts)
    except BaseException:
        lock.release(remove=True)
        raise


def _resume(
    command: Command[ConfigT], source: ConfigSource[ConfigT], line: CommandLine, stop: StopRequest, given: str
) -> int:
    """Goes on with the run in the directory `given`; a run that is complete is verified."""
    resuming = command.resuming
    if resuming is None:
        raise UsageError(f"resume={given}: {command.module} cannot go on with a run")
    check_composition(source, line.overrides)
    masker = Masker(os.environ)
    with earlier_run(given) as earlier:
        try:
            begun = _next_attempt(command, resuming, source, line, stop, earlier, masker)
        except OSError as error:
            raise earlier.refusal(str(error)) from error
        if isinstance(begun, int):
            return begun
        composition, run = begun
        return _until_its_end(command, composition, run, RunDirectory(path=earlier.path, created=()), masker)


def _next_attempt(
    command: Command[ConfigT],
    resuming: Resuming,
    source: ConfigSource[ConfigT],
    line: CommandLine,
    stop: StopRequest,
    earlier: EarlierRun,
    masker: Masker,
) -> tuple[Composition[ConfigT], Run] | int:
    """Checks that the run may go on and begins an attempt; the exit code of a run that has all of its results."""
    if source.extra_dir is None:
        source = replace(source, extra_dir=earlier.extra_dir())
    composition = compose_config(source, earlier.overrides(source, line.overrides))
    if is_dry_run(composition.config):
        raise UsageError(f"dry_run=true: has no effect with resume={earlier.path}, whose rows have been checked")
    config = masker.resolved(composition.tree)
    earlier.check_config(config, resuming.free_keys)
    code = resuming.settled(earlier.path, earlier.manifest)
    if code is not None:
        if earlier.manifest["status"] != COMPLETE:
            earlier.manifest.finish(COMPLETE, code)
        return code
    if composition.config.reads_standard_input:
        raise earlier.refusal("its input is standard input, which can be read only once")
    try:
        check(command, composition.config)
        files = resuming.fingerprint(composition.config)
    except (UsageError, ValueError) as error:
        raise earlier.refusal(str(error)) from error
    earlier.check_files(files)
    numbers = continuation(earlier.path, earlier.manifest)
    clock = Clock.resumed(datetime.fromisoformat(earlier.manifest["clock_zero"]), numbers.last_ns)
    attempt_facts = facts(command.module, line.words, line.overrides, config, masker)
    with stop.deferred():
        earlier.manifest.resume(clock, attempt_facts)
    run = Run(directory=earlier.path, manifest=earlier.manifest, clock=clock, numbers=numbers, stop=stop)
    return composition, run


def _until_its_end(
    command: Command[ConfigT],
    composition: Composition[ConfigT],
    run: Run,
    directory: RunDirectory,
    masker: Masker,
) -> int:
    resumable = command.resuming is not None and not composition.config.reads_standard_input
    ending = _Ending(command.module, directory, run, masker, resumable)
    return ending.of(lambda: _job(command, composition, run, directory, masker))


def _job(
    command: Command[ConfigT],
    composition: Composition[ConfigT],
    run: Run,
    directory: RunDirectory,
    masker: Masker,
) -> int:
    run.stop.check()
    write_hydra_files(directory.path, composition, masker)
    with _job_logging(composition.config.log_level, directory.path / RUN_LOG):
        return command.run(composition.config, run)


@contextmanager
def _job_logging(level: str | None, log_file: Path) -> Iterator[None]:
    configure_job_logging(level, log_file)
    try:
        yield
    finally:
        close_job_logging()


@dataclass(frozen=True, slots=True)
class _Ending:
    """Turns the way a job ends into a manifest, a message and an exit code."""

    module: str
    directory: RunDirectory
    run: Run
    masker: Masker
    resumable: bool

    def of(self, job: Callable[[], int]) -> int:
        try:
            code = job()
            if code not in (EXIT_COMPLETE, EXIT_ROWS_FAILED):
                raise RuntimeError(f"{self.module} returned {code!r}; a run returns 0 or 3, or raises")
            self.run.stop.ignore()
            return self._finish(COMPLETE, code)
        except KeyboardInterrupt as interrupt:
            self.run.stop.ignore()
            return self._interrupted(interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT))
        except (UsageError, ModelError) as error:
            self.run.stop.ignore()
            return self._never_began(error)
        except (Exception, SystemExit) as error:
            self.run.stop.ignore()
            return self._failed(error)

    def _interrupted(self, stopped: Stopped) -> int:
        complain(f"{stopped}: stopped; what was finished is in {self._path}{self._cure}")
        return self._finish(INTERRUPTED, stopped.exit_code, str(stopped))

    def _never_began(self, error: Exception) -> int:
        complain(str(error))
        if self.directory.discard():
            return EXIT_USAGE
        return self._finish(FAILED, EXIT_USAGE, str(error), f"{error}\n")

    def _failed(self, error: BaseException) -> int:
        summary = f"{type(error).__name__}: {error}"
        complain(f"the run failed: {' '.join(summary.split())}; traceback in {self._path / RUN_LOG}{self._cure}")
        return self._finish(FAILED, EXIT_FAILED, summary, "".join(traceback.format_exception(error)))

    def _finish(self, status: str, code: int, error: str | None = None, log: str | None = None) -> int:
        """The exit code: `code`, or 1 where even the last lines cannot be written (a full disk)."""
        mask = self.masker.text
        try:
            if log is not None:
                _append_if_possible(self.directory.path, self.module, mask(log))
            self.run.manifest.finish(status, code, None if error is None else mask(error))
        except OSError as cause:
            complain(f"{self._path}: the end of the run cannot be written down: {cause}")
            return code if code not in (EXIT_COMPLETE, EXIT_ROWS_FAILED) else EXIT_FAILED
        return code

    @property
    def _cure(self) -> str:
        return f"; to go on: python -m {self.module} resume={self._path}" if self.resumable else ""

    @property
    def _path(self) -> Path:
        """As the user would type it."""
        return Path(os.path.relpath(self.directory.path))


def _append_if_possible(directory: Path, module: str, log: str) -> None:
    """A full disk that has no room for the traceback may still have some for the manifest."""
    try:
        append_to_log(directory, module, log)
    except OSError as error:
        complain(f"{directory / RUN_LOG}: {error}")


def _show(command: Command[ConfigT], source: ConfigSource[ConfigT], line: CommandLine) -> int:
    """--help, --cfg, --info, --shell-completion, ...: Hydra's own output, after our own check of the overrides."""
    if line.resolves:
        compose_config(source, line.overrides)
    elif line.shows in ("--help", "--cfg", "--info"):
        check_composition(source, line.overrides)
    register(source)

    def nothing_to_run(config: object) -> None:
        raise AssertionError(f"{line.shows} must not run a job")

    nothing_to_run.__module__ = command.module  # Hydra takes the application's name from it
    before, sys.argv = sys.argv, [sys.argv[0], *map(as_text, line.words)]
    try:
        hydra.main(str(command.config_dir), command.config_name, HYDRA_VERSION_BASE)(nothing_to_run)()
    except SystemExit as ended:
        return EXIT_USAGE if ended.code else EXIT_COMPLETE
    finally:
        sys.argv = before
    return EXIT_COMPLETE
