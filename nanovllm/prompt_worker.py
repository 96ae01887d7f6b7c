"""Prompts to token ids, in a process of its own that is bounded in time and memory."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO

import msgspec
import numpy as np

from nanovllm.errors import PromptError
from nanovllm.prompt_process import ENCODE_CPU_S, LENGTH, MAX_TEXT_BYTES, READY, RENDER_CPU_S
from nanovllm.prompts import Conversation, PromptSetup

MAX_BATCH = 64
"""Prompts in one call; what the process says of each one that it has finished must fit into a pipe."""
START_S = 120.0
"""A process that is not ready after so long, on however busy a machine, never will be."""
STUCK_S = 60.0
"""Without a prompt finished, as where a signal has stopped the process: its own limits count processor time alone."""

_ROOT = Path(__file__).resolve().parents[1]
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME")
"""What the process inherits: nothing that could be a secret."""
_MAX_REPLY_BYTES = MAX_BATCH * 4 * (MAX_TEXT_BYTES + 4096)


class PromptWorker:
    """Renders chat templates and tokenises in a process of its own, started when it is first needed.

    Why a process: rendering and tokenising in a thread costs the step loop half of its steps, as each prompt takes the
    interpreter lock from it (2 cores, steps of 0.3 ms of Python and 1 ms of device: 153 of 725 steps/s remained with a
    thread that works prompt by prompt, 713 with batches of 32, 727 with a process). And a template or a regular
    expression that never ends, or takes all memory, can be ended.

    A prompt that breaks a limit becomes a PromptError and touches no other: the process is replaced, and what was
    under way is done again. Not for several threads at once.
    """

    def __init__(self, setup: PromptSetup) -> None:
        self._setup = setup
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[bytes | tuple[str, str]]).decode
        self._process: _Process | None = None

    @property
    def chat_template(self) -> str | None:
        return self._setup.chat_template

    def token_ids(self, prompts: Sequence[str | Conversation]) -> list[np.ndarray | PromptError]:
        """int32 ids of each prompt, or why it has none.

        Codes: `invalid_text` (no Unicode), `invalid_messages` (no JSON), `no_chat_template`, `chat_template` (the
        template refuses the messages), `prompt_too_large`, `prompt_too_slow` (a limit of prompt_process), `prompt_died`
        (the process died of it).
        """
        results: list[np.ndarray | PromptError | None] = []
        encoded = []
        for prompt in prompts:
            message = self._encoded(prompt)
            if isinstance(message, PromptError):
                results.append(message)
            else:
                results.append(None)
                encoded.append(msgspec.Raw(message))
        replies = iter(self._replies(encoded))
        return [next(replies) if result is None else result for result in results]

    def start(self) -> None:
        """Starts the process now, if it is not there yet; token_ids then need not wait for that."""
        if self._process is None:
            self._process = _Process(self._encode(self._setup))

    def close(self) -> None:
        """Ends the process. A further call of token_ids would start another."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _encoded(self, prompt: str | Conversation) -> bytes | PromptError:
        if isinstance(prompt, Conversation) and self._template(prompt) is None:
            return PromptError("no_chat_template", "the model has no chat template; give a prompt instead of messages")
        try:
            return self._encode(prompt)
        except UnicodeEncodeError as error:
            return PromptError("invalid_text", f"the text is not valid Unicode: {error.reason}")
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            return PromptError("invalid_messages", f"the conversation is not JSON: {error}")

    def _template(self, chat: Conversation) -> str | None:
        return self._setup.chat_template if chat.tools is None else self._setup.tool_template

    def _replies(self, prompts: Sequence[msgspec.Raw]) -> list[np.ndarray | PromptError]:
        if len(prompts) > MAX_BATCH:
            parts = [prompts[first : first + MAX_BATCH] for first in range(0, len(prompts), MAX_BATCH)]
            return [reply for part in parts for reply in self._replies(part)]
        if not prompts:
            return []
        self.start()
        assert self._process is not None
        data = self._process.exchange(self._encode(prompts))
        if data is not None:
            return [_result(reply) for reply in self._decode(data)]
        num_finished, cause = self._process.num_finished, self._process.end()
        self._process = None
        if num_finished >= len(prompts):  # it died with its work done: somebody has ended it
            return self._replies(prompts)
        before, culprit, rest = prompts[:num_finished], prompts[num_finished], prompts[num_finished + 1 :]
        alone = len(prompts) == 1 or cause == signal.SIGPROF
        found = [_death(cause)] if alone else self._replies([culprit])  # alone it must die again
        return [*self._replies(before), *found, *self._replies(rest)]


def _result(reply: bytes | tuple[str, str]) -> np.ndarray | PromptError:
    return np.frombuffer(reply, np.int32) if isinstance(reply, bytes) else PromptError(*reply)


def _death(cause: int) -> PromptError:
    if cause == signal.SIGPROF:
        return PromptError(
            "prompt_too_slow",
            f"the prompt takes more than {RENDER_CPU_S:g} s of processor time to render or {ENCODE_CPU_S:g} s to "
            "tokenise",
        )
    how = signal.Signals(cause).name if cause in set(signal.Signals) else f"exit code {-cause}"
    return PromptError("prompt_died", f"the process that renders and tokenises the prompt died of it ({how})")


class _Process:
    """One prompt process, ready."""

    def __init__(self, setup: bytes) -> None:
        self.num_finished = 0
        """Prompts of the exchange under way that are done."""
        self._finished, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in _end
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nanovllm.prompt_process", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(theirs,),
                env=_environment(),
                start_new_session=True,  # Ctrl-C at a terminal is for the job, which then ends this
            )
        finally:
            os.close(theirs)
        self._process = process
        self._end = weakref.finalize(self, _end, process, self._finished, self._errors)
        if self._exchange(setup, START_S) != READY:
            raise RuntimeError(f"the process that tokenises prompts did not start: {self._complaint()}")

    def exchange(self, message: bytes) -> bytes | None:
        """The reply to a batch; None where the process died, or was ended because it was stuck."""
        self.num_finished = 0
        return self._exchange(message, STUCK_S)

    def end(self) -> int:
        """Ends the process, gives everything back and returns the signal that it died of, else minus its exit code."""
        self._end()
        return -self._process.returncode

    def _exchange(self, message: bytes, patience_s: float) -> bytes | None:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        try:
            requests.write(LENGTH.pack(len(message)) + message)
            requests.flush()
        except BrokenPipeError:
            self._count_finished()
            self._process.wait()
            return None
        if not self._answers(replies, patience_s):
            self._process.send_signal(signal.SIGPROF)
            self._process.send_signal(signal.SIGCONT)
        head = replies.read(LENGTH.size)
        self._count_finished()
        if len(head) < LENGTH.size:
            self._process.wait()
            return None
        (size,) = LENGTH.unpack(head)
        if size > _MAX_REPLY_BYTES:
            raise RuntimeError(f"the process that tokenises prompts sends {size:,} bytes at once")
        data = replies.read(size)
        return data if len(data) == size else None

    def _answers(self, replies: IO[bytes], patience_s: float) -> bool:
        """Waits for the reply, or the end of the process; False where no prompt was finished for `patience_s`."""
        poll = select.poll()
        poll.register(replies, select.POLLIN)
        since = time.monotonic()
        while not poll.poll(1000):
            if self._count_finished():
                since = time.monotonic()
            if time.monotonic() - since > patience_s:
                return False
        return True

    def _count_finished(self) -> int:
        try:
            count = len(os.read(self._finished, MAX_BATCH))
        except BlockingIOError:
            return 0
        self.num_finished += count
        return count

    def _complaint(self) -> str:
        """How a process that is not ready ended, and its last words."""
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read()[-2000:].decode(errors="replace").strip()
        return f"exit code {self._process.returncode}; {words or 'it said nothing'}"


def _end(process: subprocess.Popen[bytes], finished: int, errors: BinaryIO) -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):  # what was not sent to a process that is gone
            stream.close()
    try:
        process.wait(0.5 if process.returncode is None else None)
    except subprocess.TimeoutExpired:  # in the middle of a prompt
        process.kill()
        process.wait()
    os.close(finished)
    errors.close()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    path = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
