"""Log lines on a terminal: one format, nothing in them that steers the terminal, no torn progress bar."""

import logging
import re
import sys

LINE_FORMAT = "[%(asctime)s] [%(name)s] [%(levelname)s] %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls but tab and newline, marks that reorder text or break lines, halves of surrogate pairs."""


def escape_controls(text: str) -> str:
    """`text` with control characters written as backslash escapes; tabs and newlines stay."""
    return text if text.isprintable() else _STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


class LineFormatter(logging.Formatter):
    """One line for a message whatever is in it, and below it the traceback if there is one.

    Prompts, paths and exceptions can carry any character; none of them moves the cursor, recolours the terminal or
    forges a line.
    """

    def __init__(self) -> None:
        super().__init__(LINE_FORMAT, TIME_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).rstrip("\n").replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


class TerminalHandler(logging.Handler):
    """Writes to what sys.stderr is at that moment; a tqdm bar is taken away first and drawn again below the line."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except RecursionError:
            raise
        except Exception:
            self.handleError(record)

    def _write(self, line: str) -> None:
        stream = sys.stderr
        if stream is None:
            return
        # Only a program that has imported tqdm can have a bar; importing it here would cost every start some 50 ms.
        progress = sys.modules.get("tqdm.std")
        if progress is None:
            stream.write(line + "\n")
        else:
            progress.tqdm.write(line, file=stream)
        stream.flush()
