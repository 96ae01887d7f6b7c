"""Configurations of a grid simulated side by side, each in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from jobs.command import CHECKOUT
from jobs.simulation.settings import Settings
from jobs.simulation.simulator import Outcome
from jobs.simulation.subject import Subject, decoded, encoded
from jobs.simulation.worker import LOADED
from jobs.usage import UsageError

MOST_WORKERS = 256
MOST_BY_DEFAULT = 32
"""Each takes 50 MB and more."""
ROW_S, STEP_S = 20e-6, 40e-6
"""What a recorded row and a recorded step take to simulate, about."""
LEAST_S = 0.8
"""Over the cores: work from which processes pay. They get ready while the costs are fitted, if a core is left for it;
on two cores 0.13 s of work made a command of 1.3 s longer by 0.2 s, 1.05 s one of 2.4 s shorter by that (2026-11-29).
"""


def workers_for(num_configurations: int, *, num_rows: int, num_steps: int) -> int:
    """How many processes a grid around such a run is worth; 1 where this one does it as fast."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_configurations * (ROW_S * num_rows + STEP_S * num_steps) < LEAST_S / cores:
        return 1
    return max(1, min(num_configurations, cores, MOST_BY_DEFAULT))


class Workers:
    """So many processes, which start at once and get ready by themselves. A context: outside of it they have ended.

    UsageError where they cannot be started.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[_Process] = []
        try:
            for _ in range(count):
                self._processes.append(_Process())
        except OSError as error:
            self.close()
            raise UsageError(
                f"{count} processes that simulate cannot be started: {error}; workers=1 needs none"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends them, whatever they are at."""
        for process in self._processes:
            process.end()

    def outcomes(self, subject: Subject, settings: Sequence[Settings]) -> list[Outcome]:
        """Of each of the settings, in their order; once.

        UsageError where a process was ended from outside, as the kernel does when memory runs out.
        """
        todo = deque(enumerate(settings))
        found: dict[int, Outcome] = {}

        def work(process: "_Process") -> None:
            while True:
                try:
                    place, each = todo.popleft()
                except IndexError:
                    return
                found[place] = process.outcome(each)

        with ThreadPoolExecutor(len(self._processes)) as threads:
            try:
                with tempfile.TemporaryDirectory(prefix="nanovllm-simulate-") as directory:
                    _save(subject, Path(directory))
                    self._all(threads, lambda process: process.load(directory))
                self._all(threads, work)
            except BaseException:
                self.close()  # so that no thread waits any more
                raise
        return [found[place] for place in range(len(settings))]

    def _all(self, threads: ThreadPoolExecutor, work: "Callable[[_Process], None]") -> None:
        """Raises what the first of them raises, at once."""
        done, _ = wait([threads.submit(work, process) for process in self._processes], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _save(subject: Subject, directory: Path) -> None:
    try:
        subject.save(directory)
    except OSError as error:
        raise UsageError(
            f"{directory}: what is simulated cannot be handed over there: {error}; workers=1 needs no files"
        ) from error


class _Process:
    """One worker, which may still be importing."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in end
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "jobs.simulation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                start_new_session=True,  # Ctrl-C at a terminal is for the command, which then ends this
            )
        except BaseException:
            self._errors.close()
            raise

    def load(self, directory: str) -> None:
        line = self._exchange(os.fsencode(directory))
        if line != LOADED:
            raise RuntimeError(f"a process that simulates said {line!r} instead of {LOADED!r}")

    def outcome(self, settings: Settings) -> Outcome:
        return decoded(self._exchange(encoded(settings)), Outcome)

    def _exchange(self, line: bytes) -> bytes:
        requests, answers = _pipes(self._process)
        try:
            requests.write(line + b"\n")
            requests.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise self._death()
        return answer[:-1]

    def _death(self) -> Exception:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return UsageError(
                "a process that simulates was ended by SIGKILL, as the kernel does when memory runs out; "
                "fewer side by side take less of it: workers=1"
            )
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        self._errors.seek(0)
        return RuntimeError(
            f"a process that simulates ended with {how}:\n{self._errors.read().decode(errors='replace')}"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in _pipes(self._process):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._errors.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    requests, answers = process.stdin, process.stdout
    assert requests is not None
    assert answers is not None
    return requests, answers


def _environment() -> dict[str, str]:
    path = [str(CHECKOUT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
