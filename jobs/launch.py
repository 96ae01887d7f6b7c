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
from dataclasses import dataclass
from pathlib import Path

import hydra

from jobs import command_line
from jobs.clock import Clock
from jobs.command import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_ROWS_FAILED,
    EXIT_USAGE,
    Command,
    ConfigT,
    Run,
    complain,
    facts,
    prepare,
)
from jobs.command_line import CommandLine
from jobs.compose import HYDRA_VERSION_BASE, Composition, ConfigSource, check_composition, compose_config, register
from jobs.manifest import COMPLETE, FAILED, INTERRUPTED, Manifest
from jobs.masking import Masker
from jobs.run_dir import RUN_LOG, RunDirectory, append_to_log, claim, write_hydra_files
from jobs.stop import Stopped, StopRequest
from jobs.sweep import sweep
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
            if line.multirun:
                return sweep(command, source, line, stop)
            return _run_one(command, source, line, stop)
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
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


def _run_one(command: Command[ConfigT], source: ConfigSource[ConfigT], line: CommandLine, stop: StopRequest) -> int:
    composition = prepare(command, source, line.overrides)
    masker = Masker(os.environ)
    clock = Clock()
    first_facts = facts(command.module, line.words, masker.resolved(composition.tree), masker)
    manifests: list[Manifest] = []
    with stop.deferred():  # a directory is either claimed, with its manifest, or not there
        directory = claim(
            composition.run_dir,
            composition.run_dir_chosen,
            lambda path: manifests.append(Manifest.create(path, clock, first_facts)),
        )
    run = Run(directory=directory.path, manifest=manifests[-1], clock=clock, stop=stop)
    return _Ending(command.module, directory, run, masker).of(
        lambda: _job(command, composition, run, directory, masker)
    )


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
        complain(f"{stopped}: stopped; what was finished is in {self._path}")
        return self._finish(INTERRUPTED, stopped.exit_code, str(stopped))

    def _never_began(self, error: Exception) -> int:
        complain(str(error))
        if self.directory.discard():
            return EXIT_USAGE
        return self._finish(FAILED, EXIT_USAGE, str(error), f"{error}\n")

    def _failed(self, error: BaseException) -> int:
        summary = f"{type(error).__name__}: {error}"
        complain(f"the run failed: {' '.join(summary.split())}; traceback in {self._path / RUN_LOG}")
        return self._finish(FAILED, EXIT_FAILED, summary, "".join(traceback.format_exception(error)))

    def _finish(self, status: str, code: int, error: str | None = None, log: str | None = None) -> int:
        """The exit code: `code`, or 1 where even the last lines cannot be written (a full disk)."""
        mask = self.masker.text
        try:
            if log is not None:
                append_to_log(self.directory.path, self.module, mask(log))
            self.run.manifest.finish(status, code, None if error is None else mask(error))
        except OSError as cause:
            complain(f"{self._path}: the end of the run cannot be written down: {cause}")
            return code if code not in (EXIT_COMPLETE, EXIT_ROWS_FAILED) else EXIT_FAILED
        return code

    @property
    def _path(self) -> Path:
        """As the user would type it."""
        return Path(os.path.relpath(self.directory.path))


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
    before, sys.argv = sys.argv, [sys.argv[0], *line.words]
    try:
        hydra.main(str(command.config_dir), command.config_name, HYDRA_VERSION_BASE)(nothing_to_run)()
    except SystemExit as ended:
        return EXIT_USAGE if ended.code else EXIT_COMPLETE
    finally:
        sys.argv = before
    return EXIT_COMPLETE
