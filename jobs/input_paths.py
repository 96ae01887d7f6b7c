"""The files that an input stands for."""

import errno
import glob
import io
import os
import stat

from jobs.usage import UsageError

STANDARD_INPUT = "-"
PARQUET_SUFFIXES = (".parquet", ".pq")


class InputError(UsageError):
    """An input that cannot be read as rows at all; the message names the path and the cure."""


def resolve_paths(source: str) -> tuple[str, ...]:
    """The files that `source` stands for, all of them there; raises InputError."""
    if source == STANDARD_INPUT:
        return (STANDARD_INPUT,)
    path = os.path.expanduser(source)
    if not os.path.exists(path) and glob.has_magic(path):
        return _matches(source, path)
    _check_path(path, "")
    return (path,)


def _matches(source: str, pattern: str) -> tuple[str, ...]:
    found = [path for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not found:
        raise InputError(f"input={printable(source)}: no file matches; the working directory is {os.getcwd()}")
    for path in found:
        _check_path(path, f" (matched by {printable(source)})")
    return tuple(found)


def _check_path(path: str, origin: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_open(path, error, origin) from None
    if stat.S_ISDIR(mode):
        raise InputError(
            f"input={printable(path)}: is a directory{origin}; name a file or a glob such as "
            f"'{printable(os.path.join(path, '*.jsonl'))}'"
        )
    if not os.access(path, os.R_OK):
        raise cannot_open(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), origin)


def cannot_open(path: str, error: Exception, origin: str = "") -> InputError:
    """The error for a file that the system refuses; `origin` says how the input led to it."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    cure = f"; the working directory is {os.getcwd()}" if not os.path.isabs(path) else ""
    return InputError(f"input={printable(path)}: {reason.lower()}{origin}{cure}")


def open_file(path: str) -> io.BufferedReader:
    """Opens a file of the input for reading; raises InputError."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise cannot_open(path, error) from None


def is_parquet(path: str) -> bool:
    return path.lower().endswith(PARQUET_SUFFIXES)


def is_regular(path: str) -> bool:
    return os.path.isfile(path)


def printable(path: str) -> str:
    """The path as text that JSON can hold; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
