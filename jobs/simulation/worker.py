"""The program of a process that simulates one configuration after the other: python -m jobs.simulation.worker

Its standard input gives a directory that holds a Subject, then Settings, each on a line of its own; its standard output
answers with LOADED, then with an Outcome for each. It ends when its standard input does.
"""

import os
import sys
from pathlib import Path

from jobs.simulation.heap import keep_freed_memory, take_memory_ahead
from jobs.simulation.settings import Settings
from jobs.simulation.subject import Subject, decoded, encoded
from nanovllm.quiet_gc import collector_kept_out

LOADED = b"loaded"


def main() -> None:
    keep_freed_memory()
    take_memory_ahead()
    requests = sys.stdin.buffer
    directory = requests.readline()
    if not directory:
        return
    subject = Subject.load(Path(os.fsdecode(directory.removesuffix(b"\n"))))
    _answer(LOADED)
    with collector_kept_out():
        for line in requests:
            _answer(encoded(subject.outcome(decoded(line, Settings))))


def _answer(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
