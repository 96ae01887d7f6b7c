"""One job of a sweep: its directory's name, its process, and what stands in its manifest when that is gone."""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs import complaints
from jobs.clock import Clock
from jobs.command import EXIT_FAILED, EXIT_USAGE, complain, facts
from jobs.compose import RUN_DIR
from jobs.manifest import FAILED, INTERRUPTED, RUNNING, Manifest
from jobs.manifest import NAME as MANIFEST
from jobs.masking import Masker
from jobs.run_dir import append_to_log, file_name
from jobs.stop import EXIT_CODES, StopRequest
from jobs.usage import UsageError

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One combination."""

    overrides: list[str]
    """In the words that its own process is started with."""
    swept: list[str]
    """Those of them that differ between the jobs."""

    @property
    def title(self) -> str:
        return " ".join(complaints.shown(text) for text in self.swept)

    def directory_name(self, masker: Masker) -> str:
        """Swept keys and values, and a hash of all overrides, which tells apart what the allowed characters cannot."""
        digest = hashlib.sha256("\0".join(self.overrides).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        words = [masker.argument(text).replace("=", "-", 1) for text in self.swept]
        return file_name("_".join(words) or "job", f"_{digest}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRun:
    """One job with its directory, which exists before its process does."""

    label: str
    """What messages on the terminal begin with."""
    module: str
    flags: list[str]
    job: Job
    path: Path

    def run(self, check: Callable[[], dict[str, object]], stop: StopRequest) -> int:
        """The job's exit code, which stands in its manifest however the job ended."""
        try:
            config = check()
        except UsageError as error:
            complain(f"{self.label}: {error}")
            self._write_failure(EXIT_USAGE, str(error), f"{error}\n", None)
            return EXIT_USAGE
        except Exception as error:  # a defect in this job's check must not keep the others from running
            complain(f"{self.label}: {type(error).__name__}: {error}")
            self._write_failure(EXIT_FAILED, str(error), "".join(traceback.format_exception(error)), None)
            return EXIT_FAILED
        code = _Process(self._words()).run(stop)
        self._settle(code, config)
        return code

    def _words(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self._arguments()]

    def _arguments(self) -> list[str]:
        return [*self.flags, *self.job.overrides, f"{RUN_DIR}={complaints.quoted(str(self.path))}"]

    def _settle(self, code: int, config: dict[str, object]) -> None:
        """Writes down what a process that was killed or crashed could not."""
        error = f"the job's process {_ending_in_words(code)}"
        if not (self.path / MANIFEST).exists():
            self._write_failure(code, error, f"{error} before the run began\n", config)
            return
        manifest = Manifest.load(self.path)
        if manifest["status"] == RUNNING:
            self._finish(manifest, code, error, f"{error} before the run was complete\n")
        elif manifest["exit_code"] != code:
            manifest.finish(manifest["status"], code, f"{error} after the run had ended")

    def _write_failure(self, code: int, error: str, log: str, config: dict[str, object] | None) -> None:
        masker = Masker(os.environ)
        first_facts = facts(self.module, self._arguments(), self.job.overrides, config, masker)
        try:
            self._finish(Manifest.create(self.path, Clock(), first_facts), code, masker.text(error), masker.text(log))
        except OSError as cause:
            complain(f"{self.path}: the job's failure cannot be written down: {cause}")

    def _finish(self, manifest: Manifest, code: int, error: str, log: str) -> None:
        append_to_log(self.path, self.module, log)
        manifest.finish(INTERRUPTED if code in EXIT_CODES.values() else FAILED, code, error)


class _Process:
    """A job's process, in a process group of its own: Ctrl-C reaches it once, through the sweep."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []

    def run(self, stop: StopRequest) -> int:
        """Waits for its end, passing signals on; the exit code as a shell gives it (137 after SIGKILL)."""
        with stop.forwarded(self._pass_on):
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_end_with_parent
            )
            self._deliver()
            code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _pass_on(self, signum: int) -> None:
        self._signals.append(signum)
        self._deliver()

    def _deliver(self) -> None:
        """Sends what has arrived; signals that came before the process existed reach it as one."""
        if self._process is None:
            return
        signals, self._signals = self._signals, []
        for signum in signals[-1:]:
            self._process.send_signal(signum)


def _end_with_parent() -> None:
    """In the child, before it becomes the job: a sweep that is killed takes its job with it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _ending_in_words(code: int) -> str:
    if code > 128 and code - 128 in signal.valid_signals():
        name = signal.Signals(code - 128).name
        return f"was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}, exit code {code},"
    return f"ended with exit code {code}"
