"""Starts an analysis command as a program: it reads run directories and makes none."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

EXIT_DONE, EXIT_FOUND, EXIT_USAGE = 0, 1, 2
"""EXIT_FOUND: an audit has found a violation, a comparison a difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """One command: its keys, and what it does with their values."""

    about: str
    keys: Mapping[str, str]
    """What each key means, in words that complete "it must be ..."."""
    required: Sequence[str]
    run: Callable[[Mapping[str, str]], int]
    """Returns the exit code; UsageError for what its user can cure."""


def main(module: str, words: Sequence[str] | None = None) -> int:
    """Runs the ANALYSIS of `jobs.analysis.<module>` and returns its exit code; 2 and one line where it cannot run."""
    try:
        importlib.import_module("nanovllm")  # refuses a bad NANOVLLM_LOG_LEVEL
    except ValueError as error:
        return _complain(str(error))
    from jobs.analysis import arguments
    from jobs.usage import UsageError

    analysis: Analysis = importlib.import_module(f"jobs.analysis.{module}").ANALYSIS
    words = sys.argv[1:] if words is None else words
    try:
        if {"--help", "-h"} & set(words):
            print(arguments.help_text(f"jobs.{module}", analysis.about, analysis.keys, analysis.required))
            return EXIT_DONE
        code = analysis.run(arguments.parse(words, analysis.keys, analysis.required))
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return EXIT_USAGE
