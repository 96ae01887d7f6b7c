"""Who shows nanovllm's log lines and from which level on: the program that imports it, or a job that owns its log."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nanovllm.logging.terminal import LineFormatter, TerminalHandler

LEVEL_VARIABLE = "NANOVLLM_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_LIBRARY_HANDLER = "nanovllm.library"
_JOB_TERMINAL = "nanovllm.job.terminal"
_JOB_FILE = "nanovllm.job.file"
_JOB_LOGGERS = ("nanovllm", "jobs")


def parse_level(key: str, word: str) -> int:
    """The number of a level's name in any case; raises ValueError that names the key, the word and the four levels."""
    name = word.strip().upper() if isinstance(word, str) else word
    if name not in LEVELS:
        raise ValueError(f"{key}={word}: must be one of {', '.join(LEVELS)}")
    return logging.getLevelNamesMapping()[name]


def configure_library_logging() -> None:
    """Read NANOVLLM_LOG_LEVEL and make the log visible in a program that has no logging of its own.

    Called when nanovllm is first imported. Where the root logger already has handlers, the program has configured
    logging itself: its format, handlers and level hold, and nothing is changed. Else the level is the variable's (INFO
    without one; an empty one counts as none), and lines go to stderr only as long as the root logger stays without
    handlers: a program that configures logging later takes over the lines too, and none is shown twice.
    """
    level = _level_from_environment()
    package = logging.getLogger("nanovllm")
    if logging.getLogger().handlers or any(handler.name == _LIBRARY_HANDLER for handler in package.handlers):
        return
    if level is not None:
        package.setLevel(level)
    elif package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    handler = TerminalHandler()
    handler.name = _LIBRARY_HANDLER
    handler.addFilter(_no_handler_at_the_root)
    package.addHandler(handler)


def configure_job_logging(level: str | None, log_file: Path) -> None:
    """Give a job its log: the same lines on stderr and, appended, in `log_file`, until `close_job_logging`.

    `level` wins over NANOVLLM_LOG_LEVEL, which wins over INFO; it holds for the loggers `nanovllm.*` and `jobs.*`.
    Other libraries' lines and Python's warnings are shown from WARNING on. Handlers of others that write to stdout or
    stderr are set aside meanwhile, so that no line appears twice. A job log that is still open is closed first.
    """
    chosen = parse_level("log_level", level) if level is not None else _level_from_environment() or logging.INFO
    close_job_logging()
    file_handler = _JobFileHandler(log_file, _remember())
    root = logging.getLogger()
    for handler in file_handler.before.handlers:
        root.removeHandler(handler)
    terminal = TerminalHandler()
    terminal.name = _JOB_TERMINAL
    for handler in (terminal, file_handler):
        root.addHandler(handler)
    root.setLevel(max(chosen, logging.WARNING))
    for name in _JOB_LOGGERS:
        logging.getLogger(name).setLevel(chosen)
    _enable_loggers()
    logging.captureWarnings(True)


def close_job_logging() -> None:
    """Close the job's log file and put back what `configure_job_logging` set aside; nothing to do without a job log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if handler.name not in (_JOB_TERMINAL, _JOB_FILE):
            continue
        root.removeHandler(handler)
        handler.close()
        if isinstance(handler, _JobFileHandler):
            _restore(handler.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """Logging as a job found it."""

    handlers: tuple[logging.Handler, ...]
    """Of the root logger, those that write to a standard stream."""
    levels: dict[str | None, int]


class _JobFileHandler(logging.FileHandler):
    """run.log; each line reaches the operating system before the next one is written."""

    def __init__(self, log_file: Path, before: _Before) -> None:
        super().__init__(log_file, mode="a", encoding="utf-8", errors="backslashreplace")
        self.before = before
        self.name = _JOB_FILE
        self.setFormatter(LineFormatter())


def _level_from_environment() -> int | None:
    word = os.environ.get(LEVEL_VARIABLE, "")
    return parse_level(LEVEL_VARIABLE, word) if word.strip() else None


def _no_handler_at_the_root(record: logging.LogRecord) -> bool:
    return not logging.getLogger().handlers


def _remember() -> _Before:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    handlers = tuple(h for h in logging.getLogger().handlers if _writes_to(h, streams))
    levels = {name: logging.getLogger(name).level for name in (None, *_JOB_LOGGERS)}
    return _Before(handlers=handlers, levels=levels)


def _writes_to(handler: logging.Handler, streams: tuple[object, ...]) -> bool:
    return type(handler) is logging.StreamHandler and any(handler.stream is stream for stream in streams)


def _restore(before: _Before) -> None:
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in before.handlers:
        root.addHandler(handler)
    for name, level in before.levels.items():
        logging.getLogger(name).setLevel(level)


def _enable_loggers() -> None:
    """A dictConfig with disable_existing_loggers, such as Hydra's `disabled`, may have switched ours off."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".", 1)[0] in (*_JOB_LOGGERS, "py"):
            logging.getLogger(name).disabled = False
