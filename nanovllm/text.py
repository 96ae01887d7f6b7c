"""Text to token ids and back: the model's tokenizer and chat template."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ModelError, PromptError
from nanovllm.prompts import PromptSetup

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
"""Sets of files, each of which makes a tokenizer."""


def has_tokenizer(directory: Path) -> bool:
    return any(all((directory / name).is_file() for name in names) for names in TOKENIZER_FILES)


def load_tokenizer(directory: Path | None) -> "Tokenizer | None":
    """The tokenizer of a model directory; None when it has none.

    Nothing is downloaded and no code of the model is run. Raises ModelError for files that make no tokenizer.
    """
    if directory is None or not has_tokenizer(directory):
        return None
    _refuse_foreign_code(directory / "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        backed = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust side raises plain Exception for a broken tokenizer.json
        raise ModelError(f"no usable tokenizer in {directory}: {type(error).__name__}: {error}") from error
    if not hasattr(backed, "backend_tokenizer"):
        raise ModelError(f"{directory}: the tokenizer has no tokenizer.json form; save it as one with transformers")
    return Tokenizer(backed)


class Tokenizer:
    """A transformers tokenizer whose decoding is exact at the end of the text.

    What is no text is skipped: special tokens, and ids that the tokenizer does not know (a model's vocabulary
    may be padded beyond its tokenizer's).
    """

    def __init__(self, backed: Any) -> None:
        """`backed` is a transformers tokenizer that rests on the `tokenizers` library."""
        self._backed = backed
        self._backend = backed.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        decoders = _decoder_types(self._backend)
        self.byte_level = decoders == ["ByteLevel"]
        """Whether each token stands for the same bytes wherever it is, as in Qwen's, GPT's and Llama 3's."""
        self._pieces = _Pieces(self._backend, self.byte_level, "ByteFallback" in decoders)

    @property
    def eos_token_id(self) -> int | None:
        return self._backed.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return self._backed.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that transformers adds by default.

        Raises PromptError with code `invalid_text` for text that is no Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError("invalid_text", f"the text is not valid Unicode: {error.reason}") from error
        return self._backend.encode(text).ids

    def prompt_setup(self) -> PromptSetup:
        """What a process needs to make the same token ids from prompts, and from conversations."""
        has_template = self.has_chat_template
        return PromptSetup(
            tokenizer=self._backend.to_str(),
            chat_template=self._backed.get_chat_template() if has_template else None,
            tool_template=self._backed.get_chat_template(tools=[]) if has_template else None,
            special_tokens={name: _texts(token) for name, token in self._backed.special_tokens_map.items()},
        )

    def special_token_ids(self, strings: Iterable[str]) -> tuple[int, ...]:
        """Ids of those `strings` that are special tokens, which no decoded text ever shows; ascending.

        A stop string that is one must also stop as an id.
        """
        special = {token.content: i for i, token in self._backed.added_tokens_decoder.items() if token.special}
        return tuple(sorted({special[string] for string in strings if string in special}))

    def token_bytes(self, token_id: int) -> bytes | None:
        """What the token stands for by itself; None when it is no text.

        Of a tokenizer that is not byte level, only the tokens of single bytes have any.
        """
        return self._pieces[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of all `ids` together, without an incomplete character at the end.

        A replacement character stays where the model wrote one, or wrote bytes that can never become a
        character. Spaces are left as they are. Never raises, whatever the ids.
        """
        pieces = self._pieces
        if self.byte_level:
            return Utf8Decoder().push(b"".join([pieces[i] or b"" for i in ids]))
        text_ids = [i for i in ids if pieces[i] is not None]
        return self._backed.decode(
            text_ids[: len(text_ids) - self._incomplete_end(text_ids)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def final_text(self, ids: Iterable[int], stop: Sequence[str] = ()) -> str:
        """The text of `ids`, cut before the stop string that begins earliest."""
        text = self.decode(ids)
        return text[: min((at for at in map(text.find, stop) if at >= 0), default=None)]

    def _incomplete_end(self, text_ids: list[int]) -> int:
        """How many tokens of single bytes at the end are the beginning of a character without its rest."""
        begin = len(text_ids)
        while begin and self._pieces[text_ids[begin - 1]]:
            begin -= 1
        decoder = Utf8Decoder()
        decoder.push(b"".join([self._pieces[i] or b"" for i in text_ids[begin:]]))
        return decoder.num_pending


class Utf8Decoder:
    """Bytes to text as they come: holds back only what can still become a character.

    Bytes that cannot are replaced, as bytes.decode(errors="replace") does.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def num_pending(self) -> int:
        """Bytes held back."""
        return len(self._decoder.getstate()[0])

    def push(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        pending = self._decoder.getstate()[0]
        # CPython waits for a third byte after the first two of a surrogate, which UTF-8 does not have.
        if len(pending) == 2 and pending[0] == 0xED and pending[1] >= 0xA0:
            text += self._decoder.decode(b"", final=True)
        return text


class _Pieces(dict[int, bytes | None]):
    """What each id stands for, found when first asked for; see Tokenizer.token_bytes."""

    def __init__(self, backend: "tokenizers.Tokenizer", byte_level: bool, byte_fallback: bool) -> None:
        super().__init__()
        self._backend = backend
        self._byte_level = byte_level
        self._byte_fallback = byte_fallback
        self._special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}

    def __missing__(self, token_id: int) -> bytes | None:
        piece = self[token_id] = self._find(token_id)
        return piece

    def _find(self, token_id: int) -> bytes | None:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None or token in self._special:
            return None
        if self._byte_level:
            # An added token may hold characters outside the alphabet; it then stands for itself.
            in_alphabet = all(character in BYTE_OF_CHARACTER for character in token)
            return bytes(map(BYTE_OF_CHARACTER.__getitem__, token)) if in_alphabet else token.encode()
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return b""


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the other bytes as U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _decoder_types(backend: "tokenizers.Tokenizer") -> list[str]:
    """The steps of a tokenizer's decoder by type."""
    decoder: Any = backend.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]


def _texts(token: Any) -> str | list[str]:
    """A special token, or several, without what the tokenizer knows of them besides."""
    return [str(t) for t in token] if isinstance(token, list | tuple) else str(token)


def _refuse_foreign_code(tokenizer_config: Path) -> None:
    """`auto_map` names Python files of the model's repository."""
    if not tokenizer_config.is_file():
        return
    try:
        names = json.loads(tokenizer_config.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{tokenizer_config}: {error}") from error
    if not isinstance(names, dict):
        raise ModelError(f"{tokenizer_config}: not a JSON object")
    if "auto_map" in names:
        raise ModelError(
            f"{tokenizer_config}: auto_map needs code from the model's repository, which is never run; remove the field"
        )
