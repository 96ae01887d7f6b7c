"""The program of a process that renders chat templates and tokenises, within bounds: python -m nanovllm.prompt_process

A chat template is a stranger's program. Jinja's sandbox keeps it from everything but its arguments, yet bounds neither
its time nor its memory; the kernel does that here, to a process that holds nothing else. A tokenizer's regular
expressions are bounded with it. It ends when its standard input does.
"""

import os
import resource
import signal
import struct
import sys
from array import array
from collections.abc import Callable
from typing import BinaryIO, cast

import msgspec

from nanovllm.prompts import Conversation, PromptSetup

RENDER_CPU_S = 2.0
ENCODE_CPU_S = 4.0
"""Of processor time for one prompt; the kernel then ends the process with SIGPROF."""
MEMORY_BYTES = 1024**3
"""Address space beyond what the process has when it is ready."""
MAX_TEXT_BYTES = 2 * 1024**2
"""Of a prompt's text, rendered. Tokenising takes about 250 times its size in memory."""

LENGTH = struct.Struct("<I")
"""In front of each message through the pipes, which is msgpack."""
READY = b"ready"

TOO_LARGE = "prompt_too_large"
_MAX_REASON = 400

Renderer = Callable[..., tuple[list[str], object]]
Reply = bytes | tuple[str, str]
"""int32 token ids, or (code, reason)."""


class _Refusal(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Preparer:
    """Turns prompts into token ids."""

    def __init__(self, setup: PromptSetup) -> None:
        from tokenizers import Tokenizer

        self._setup = setup
        self._tokenizer = Tokenizer.from_str(setup.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._render: Renderer | None = None
        _bound_memory()

    def reply(self, prompt: str | Conversation) -> Reply:
        try:
            return self._token_ids(prompt)
        except _Refusal as refusal:
            return refusal.code, refusal.reason
        except MemoryError:
            return TOO_LARGE, f"rendering and tokenising the prompt needs more than {MEMORY_BYTES:,} bytes of memory"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _token_ids(self, prompt: str | Conversation) -> bytes:
        is_text = isinstance(prompt, str)
        text = prompt if is_text else self._rendered(prompt)
        if len(text) > MAX_TEXT_BYTES or len(text.encode()) > MAX_TEXT_BYTES:
            raise _Refusal(TOO_LARGE, f"the prompt's text has more than {MAX_TEXT_BYTES:,} bytes")
        signal.setitimer(signal.ITIMER_PROF, ENCODE_CPU_S)
        # The template writes the special tokens of a conversation, so none is added: one BOS, not two.
        ids = self._tokenizer.encode(text, add_special_tokens=is_text).ids
        return array("i", ids).tobytes()

    def _rendered(self, chat: Conversation) -> str:
        template = self._setup.chat_template if chat.tools is None else self._setup.tool_template
        render = self._renderer()
        signal.setitimer(signal.ITIMER_PROF, RENDER_CPU_S)
        try:
            rendered, _ = render(
                conversations=[[_without_nulls(message) for message in chat.messages]],
                tools=chat.tools,
                chat_template=template,
                add_generation_prompt=not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **{**self._setup.special_tokens, **chat.template_kwargs},
            )
            rendered[0].encode()
        except MemoryError:
            raise
        except Exception as error:  # a template can raise anything
            reason = f"the chat template refuses the messages: {type(error).__name__}: {error}"
            text = reason.encode("utf-8", "backslashreplace").decode()
            raise _Refusal("chat_template", text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}...") from None
        return rendered[0]

    def _renderer(self) -> Renderer:
        """transformers' own, imported when the first conversation comes: it takes half a second."""
        if self._render is None:
            from transformers.utils.chat_template_utils import render_jinja_template

            self._render = cast(Renderer, render_jinja_template)  # whose annotation is wrong
            _bound_memory()
        return self._render


def _without_nulls(message: dict[str, object]) -> dict[str, object]:
    """As transformers does: many templates would write `None`."""
    return {key: value for key, value in message.items() if value is not None}


def _bound_memory() -> None:
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _confine() -> None:
    """No core files, no file of any size, and processor time that runs out kills."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _receive(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    return stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else None


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def main(finished: int) -> None:
    """Serves batches of prompts; writes a byte to the descriptor `finished` after each prompt of one."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    setup = _receive(requests)
    if setup is None:
        return
    preparer = _Preparer(msgspec.msgpack.decode(setup, type=PromptSetup))
    _confine()
    _send(replies, READY)
    decode = msgspec.msgpack.Decoder(list[str | Conversation]).decode
    encode = msgspec.msgpack.Encoder().encode
    while (data := _receive(requests)) is not None:
        batch: list[Reply] = []
        for prompt in decode(data):
            batch.append(preparer.reply(prompt))
            os.write(finished, b".")
        _send(replies, encode(batch))


if __name__ == "__main__":
    main(int(sys.argv[1]))
