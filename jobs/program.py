"""Starts a command as a program."""

import importlib
import os
import sys

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(module: str) -> int:
    """Launches the COMMAND of `module` and returns its exit code.

    Nothing is imported before: nanovllm refuses a bad NANOVLLM_LOG_LEVEL when it is first imported, and for a program
    that is one line on the terminal and the exit code 2, like any other setting that cannot be.
    """
    try:
        importlib.import_module("nanovllm")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        from jobs.launch import launch

        return launch(importlib.import_module(module).COMMAND)
    except KeyboardInterrupt:  # before launch takes the signals over: importing it takes half a second
        print("error: SIGINT: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever reads --help, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
