"""One input row: what a line or a record becomes, or what is wrong with it when it becomes none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jobs.batch_line import BATCH_KEYS, batch_id, batch_request, batch_url, is_batch_line
from jobs.chat_forms import CHAT_OPTIONS, as_conversation, check_template_kwargs
from jobs.field_limits import MAX_ID_CHARS, check_length
from jobs.json_line import decode_object
from jobs.json_words import kind, shown
from jobs.prompt_forms import PROMPT_FORMS, as_prompt, as_token_ids
from jobs.prompt_template import PromptTemplate
from jobs.refusal import BadRowCode, refuse
from jobs.row_sampling import row_sampling
from nanovllm.errors import PromptError
from nanovllm.prompts import Conversation
from nanovllm.sampling_params import SamplingParams

_ID_RANGE = range(-(2**63), 2**63)
_MAX_REASON = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be answered: one line of failures.jsonl."""

    file: str
    line: int
    """1-based; in a Parquet file, the number of the record."""
    row: int
    id: str | int | None
    """None where the row's own id could not be read; the row number where it has none."""
    code: str
    """A BadRowCode, or the code of a PromptError when the engine refused the row."""
    reason: str

    @property
    def weight(self) -> int:
        """About how many bytes of memory it takes."""
        return len(self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """A row that is well-formed. Exactly one of prompt, chat and prompt_token_ids is not None, and not empty."""

    file: str
    line: int
    """1-based; in a Parquet file, the number of the record."""
    row: int
    """Ordinal over all files, bad rows included."""
    id: str | int
    """As given; the row number where none is."""
    prompt: str | None = None
    """Text that gets no chat template."""
    chat: Conversation | None = None
    """Messages for the model's chat template; reader.system is already in front."""
    prompt_token_ids: list[int] | None = None
    """Within [0, 2**31); whether the model has them is for the engine to say."""
    sampling: SamplingParams | None = None
    """The row's own; None where it has none."""
    columns: dict[str, object] = field(default_factory=dict)
    """The columns that writer.keep names, in its order; None where the row has no such column."""
    url: str | None = None
    """Of a Batch line: which of OpenAI's forms its answer has."""

    @property
    def messages(self) -> list[dict[str, object]] | None:
        return None if self.chat is None else self.chat.messages

    @property
    def text_or_chat(self) -> str | Conversation | None:
        """What has yet to become token ids; None where they were given."""
        return self.prompt if self.prompt is not None else self.chat

    @property
    def weight(self) -> int:
        """About how many bytes of memory its prompt takes."""
        if self.chat is not None:
            return sum(len(text) for message in self.chat.messages for text in message.values() if type(text) is str)
        return len(self.prompt or "") + 8 * len(self.prompt_token_ids or ())

    def failed(self, error: PromptError) -> BadRow:
        """This row as the failure that came up later, on its way into the engine or in it."""
        return BadRow(
            file=self.file, line=self.line, row=self.row, id=self.id, code=str(error.code), reason=error.reason
        )


class RowParser:
    """Turns lines and records into rows by the reader.* settings. Has no state, so threads may share one.

    - With `prompt` (see PromptTemplate) it alone makes the prompt; `messages`, `body` and so on are plain columns then.
    - `system` goes in front of a row's messages unless they already hold a system message. A prompt without messages
      has no place for it, so such a row is a bad one rather than silently answered without; `system` together with
      `prompt` could never apply and is a ValueError.
    - A null counts as absent, everywhere. The last of duplicate keys in an object wins, as in Python's own json.
    - `chat_template_kwargs` are the job's variables for the chat template; a row's own win, key by key.
    - `batch_only` refuses every row that is no OpenAI Batch line.
    - An `id` is the row's own; a Batch line has its custom_id for one, and `id` is a plain column there.
    """

    def __init__(
        self,
        *,
        prompt: str | None = None,
        system: str | None = None,
        keep: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, object] | None = None,
        batch_only: bool = False,
    ) -> None:
        for key, text in (("reader.prompt", prompt), ("reader.system", system)):
            if text is not None:
                _check_setting(key, text)
        if prompt is not None and system is not None:
            raise ValueError(
                f"reader.system={shown(system)}: reader.prompt makes plain prompts, which have no system message; "
                "put the text into the reader.prompt template, or use rows with messages"
            )
        self.template = None if prompt is None else PromptTemplate(prompt)
        self._system = system
        self._keep = tuple(keep)
        self._template_kwargs = dict(chat_template_kwargs or {})
        check_template_kwargs("reader.chat_template_kwargs", self._template_kwargs)
        self._batch_only = batch_only

    def columns(self) -> frozenset[str]:
        """Every column that a row is made from; a reader of columnar files needs no others."""
        made_from = (*PROMPT_FORMS, *CHAT_OPTIONS, *BATCH_KEYS) if self.template is None else self.template.columns
        return frozenset((*made_from, "id", "sampling", *self._keep))

    def from_line(self, file: str, line: int, row: int, data: bytes) -> InputRow | BadRow:
        """The row of one line of JSONL, never an exception, whatever the bytes are."""
        try:
            record = decode_object(data)
        except PromptError as error:
            return BadRow(file=file, line=line, row=row, id=None, code=error.code, reason=error.reason)
        return self.from_record(file, line, row, record)

    def from_record(self, file: str, line: int, row: int, record: dict[str, object]) -> InputRow | BadRow:
        """The row of one decoded record; its strings must hold no lone surrogates, as decoded UTF-8 never does."""
        row_id: str | int | None = None
        try:
            is_batch = self.template is None and is_batch_line(record)
            row_id = _row_id(record, is_batch, row)
            content = self._content(record, is_batch)
            return InputRow(
                file=file,
                line=line,
                row=row,
                id=row_id,
                prompt=content.prompt,
                chat=content.chat,
                prompt_token_ids=content.token_ids,
                sampling=content.sampling,
                columns={name: record.get(name) for name in self._keep},
                url=content.url,
            )
        except PromptError as error:
            return BadRow(file=file, line=line, row=row, id=row_id, code=error.code, reason=_limited(error.reason))

    def _content(self, record: Mapping[str, object], is_batch: bool) -> "_Content":
        if self.template is not None:
            return _Content(row_sampling(record.get("sampling")), prompt=as_prompt(self.template.fill(record)))
        form = _prompt_form(record, is_batch)
        url = None
        if is_batch:
            form, record = batch_request(record)
            url = batch_url(form)
        elif self._batch_only:
            refuse(
                BadRowCode.NOT_BATCH_LINE, f"writer.format=openai_batch needs custom_id and body; the row has {form}"
            )
        sampling = row_sampling(record.get("sampling"))
        if form == "messages":
            chat = as_conversation(record, system=self._system, template_kwargs=self._template_kwargs)
            return _Content(sampling, url, chat=chat)
        name = "body.prompt" if is_batch else form  # as the user wrote it
        self._check_is_plain(name, record)
        if form == "prompt_token_ids":
            return _Content(sampling, url, token_ids=as_token_ids(record[form], name))
        return _Content(sampling, url, prompt=as_prompt(record[form]))

    def _check_is_plain(self, name: str, record: Mapping[str, object]) -> None:
        """Nothing is asked for that only a chat template could do."""
        if self._system is not None:
            refuse(
                BadRowCode.SYSTEM_NEEDS_MESSAGES,
                f"reader.system is set, but the row has {name}, which takes no system message; it needs messages",
            )
        for option in CHAT_OPTIONS:
            if record.get(option) is not None:
                refuse(
                    BadRowCode.OPTIONS_NEED_MESSAGES,
                    f"{option} goes to a chat template, but the row has {name}, which gets none; it needs messages",
                )


class _Content(NamedTuple):
    """What a row asks for; one of the last three is not None."""

    sampling: SamplingParams | None
    url: str | None = None
    prompt: str | None = None
    chat: Conversation | None = None
    token_ids: list[int] | None = None


def _check_setting(key: str, text: str) -> None:
    if not text:
        raise ValueError(f"{key}='': must not be empty; null leaves it out")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{key}={text!a}: must be UTF-8 text")


def _prompt_form(record: Mapping[str, object], is_batch: bool) -> str:
    """The only prompt form that the row has; `body` for a Batch line."""
    found = [name for name in PROMPT_FORMS if record.get(name) is not None]
    if is_batch:
        found.append("body")
    if len(found) > 1:
        refuse(BadRowCode.SEVERAL_PROMPTS, f"the row has {' and '.join(found)}; it must have only one of them")
    if not found:
        halves = [name for name in ("custom_id", "body") if record.get(name) is not None]
        hint = f"; an OpenAI Batch line needs custom_id and body, here is only {halves[0]}" if halves else ""
        refuse(BadRowCode.NO_PROMPT, f"the row has none of {', '.join(PROMPT_FORMS)}{hint}")
    return found[0]


def _row_id(record: Mapping[str, object], is_batch: bool, row: int) -> str | int:
    if is_batch:
        return batch_id(record)
    value = record.get("id")
    if value is None:
        return row
    if isinstance(value, bool) or not isinstance(value, str | int):
        refuse(BadRowCode.BAD_ID, f"id is {kind(value)}, must be a string or an integer")
    if isinstance(value, int) and value not in _ID_RANGE:
        refuse(BadRowCode.BAD_ID, f"id is {shown(value)}, must fit into 64 bits; write it as a string")
    if isinstance(value, str):
        check_length("id", value, MAX_ID_CHARS)
    return value


def _limited(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."
