"""What a command that runs jobs consists of, and what each of its runs is given."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from jobs import provenance
from jobs.clock import Clock
from jobs.compose import Composition, ConfigSource, compose_config
from jobs.continuation import Continuation
from jobs.manifest import Manifest
from jobs.masking import Masker
from jobs.resume import Resuming
from jobs.stop import StopRequest
from jobs.usage import UsageError
from nanovllm.logging.setup import LEVEL_VARIABLE, parse_level

CHECKOUT = Path(__file__).resolve().parents[1]
CONF_DIR = CHECKOUT / "conf"

EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, EXIT_ROWS_FAILED = 0, 1, 2, 3


class JobConfig(Protocol):
    """What every command's configuration has."""

    @property
    def log_level(self) -> str | None: ...

    @property
    def reads_standard_input(self) -> bool: ...


ConfigT = TypeVar("ConfigT", bound=JobConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a job is given besides its configuration."""

    directory: Path
    """Claimed; holds manifest.json, .hydra/ and run.log."""
    manifest: Manifest
    clock: Clock
    numbers: Continuation
    """Where steps and sequences begin to count."""
    stop: StopRequest
    """Poll `stop.check()` between steps, inside `stop.deferred()`."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times load, capture, generate, write or finish."""
        return self.manifest.phase(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Generic[ConfigT]):
    """A program that runs jobs, such as jobs.generate."""

    module: str
    """What stands after `python -m`; a sweep starts each of its jobs with it."""
    config_name: str
    """conf/<config_name>.yaml, whose defaults list begins with <config_name>_schema."""
    schema: type[ConfigT]
    check: Callable[[ConfigT], None]
    """Raises ValueError or OSError when the job cannot run. Called before any directory exists; imports no torch."""
    run: Callable[[ConfigT, Run], int]
    """Does the job and returns 0, or 3 when some rows have no answer.

    What it raises decides the exit code: `Stopped` 130 or 143, `UsageError` and `ModelError` 2 (the run never began;
    its directory is removed if it holds no result), anything else 1 with the traceback in run.log.
    """
    rehearse: Callable[[ConfigT, StopRequest], int] | None = None
    """What a configuration whose `dry_run` is true does instead of a run, without a directory; returns an exit code."""
    resuming: Resuming | None = None
    """None: its runs cannot be resumed."""
    config_dir: Path = CONF_DIR


def check(command: Command[ConfigT], config: ConfigT) -> None:
    """UsageError says why this configuration cannot run."""
    try:
        if config.log_level is None and os.environ.get(LEVEL_VARIABLE, "").strip():
            parse_level(LEVEL_VARIABLE, os.environ[LEVEL_VARIABLE])
        command.check(config)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def prepare(command: Command[ConfigT], source: ConfigSource[ConfigT], overrides: Sequence[str]) -> Composition[ConfigT]:
    """Composes, validates and checks without leaving a trace; UsageError says what is wrong."""
    composition = compose_config(source, overrides)
    check(command, composition.config)
    return composition


def is_dry_run(config: JobConfig) -> bool:
    """Not every command's configuration has the key."""
    return bool(getattr(config, "dry_run", False))


def facts(
    module: str, words: Sequence[str], overrides: Sequence[str], config: object, masker: Masker
) -> dict[str, object]:
    """What the manifest says of a run from its first version on; `config` is resolved and masked already."""
    return {
        "overrides": [masker.argument(word) for word in overrides],
        "config": config,
        "command": ["python", "-m", module, *(masker.argument(word) for word in words)],
        "working_directory": os.getcwd(),
        "versions": provenance.versions(),
        "git": provenance.git(CHECKOUT),
        "machine": provenance.machine(),
    }


def complain(message: str) -> None:
    print(f"error: {Masker(os.environ).text(message)}", file=sys.stderr, flush=True)
