"""From what a user gives (text, messages or ids) to what the engine takes, and from its tokens back to text."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanovllm.engine.llm_engine import LLMEngine, SequenceOutput
from nanovllm.engine.sequence import StopCheck
from nanovllm.errors import PromptError
from nanovllm.prompt_worker import PromptWorker
from nanovllm.prompts import Conversation
from nanovllm.sampling_params import ResolvedSampling, SamplingParams, resolve
from nanovllm.stop_strings import StopChecker
from nanovllm.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt that the engine will accept."""

    token_ids: np.ndarray
    """int32"""
    sampling: ResolvedSampling
    row: int
    request_id: str
    new_stop_check: Callable[[], StopCheck] | None
    """Makes a matcher of the request's stop strings for one sequence; None without stop strings."""


class Intake:
    """Turns prompts into requests. Everything that can be wrong with one prompt is a PromptError here.

    `prepare` and `request` may run in a thread beside the one that drives the engine: they read limits alone.
    """

    def __init__(
        self, engine: LLMEngine, tokenizer: Tokenizer | None, *, vocab_size: int, defaults: SamplingParams, seed: int
    ) -> None:
        """`defaults` is the model's own sampling; `seed` is for rows that have none."""
        self.tokenizer = tokenizer
        self._engine = engine
        self._vocab_size = vocab_size
        self._defaults = defaults
        self._seed = seed
        self._worker = PromptWorker(tokenizer.prompt_setup()) if tokenizer is not None else None

    @property
    def chat_template_sha256(self) -> str | None:
        """Of the template that conversations go through; None without one."""
        template = self._worker.chat_template if self._worker is not None else None
        return None if template is None else hashlib.sha256(template.encode()).hexdigest()

    def prepare(self, prompts: Sequence[str | Conversation]) -> list[np.ndarray | PromptError]:
        """int32 token ids of each prompt, or why it has none; a text gets no chat template.

        Done in a process of its own (see PromptWorker), so the caller's interpreter is free meanwhile.
        """
        if self._worker is None:
            reason = "prompt and messages need a tokenizer and the model has none; give prompt_token_ids"
            return [PromptError("no_tokenizer", reason) for _ in prompts]
        return self._worker.token_ids(prompts)

    def close(self) -> None:
        """Ends the process that `prepare` uses."""
        if self._worker is not None:
            self._worker.close()

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of one text, here and now; raises PromptError."""
        return self._needs_tokenizer("a prompt").encode(text)

    def request(
        self, token_ids: Sequence[int] | np.ndarray, *, sampling: SamplingParams, row: int, request_id: str = ""
    ) -> Request:
        """Raises PromptError for a prompt that can never be served."""
        ids = self._checked_ids(token_ids)
        resolved = resolve(sampling, self._defaults, self._seed)
        resolved, new_stop_check = self._with_stops(resolved)
        self._engine.check(len(ids), resolved.max_tokens)
        return Request(
            token_ids=ids,
            sampling=resolved,
            row=row,
            request_id=request_id,
            new_stop_check=new_stop_check,
        )

    def add(self, request: Request, sample: int = 0) -> int:
        """Queue one sample of a request; returns its seq_id."""
        return self._engine.add(
            request.token_ids,
            request.sampling,
            row=request.row,
            sample=sample,
            request_id=request.request_id,
            stop_check=request.new_stop_check() if request.new_stop_check else None,
        )

    def text(self, output: SequenceOutput) -> str | None:
        """The output's text, cut before a stop string; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.final_text(output.token_ids, output.stop)

    def _needs_tokenizer(self, form: str) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError("no_tokenizer", f"{form} needs a tokenizer and the model has none; give prompt_token_ids")
        return self.tokenizer

    def _checked_ids(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """As int32, every one a token of the model."""
        try:  # the minimum of an array takes a thirtieth of the time that a list's does
            ids = token_ids if isinstance(token_ids, np.ndarray) else np.array(token_ids, np.int32)
        except OverflowError:  # far out of the range
            self._check_range("prompt_token_ids", int(min(token_ids)), int(max(token_ids)))
            raise
        if ids.ndim != 1:
            raise TypeError(f"prompt_token_ids has {ids.ndim} dimensions, must be a flat sequence of integers")
        if len(ids):
            self._check_range("prompt_token_ids", int(ids.min()), int(ids.max()))
        return ids.astype(np.int32, copy=False)

    def _check_range(self, name: str, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise PromptError(
                "token_id_out_of_range",
                f"{name} holds {wrong}; ids of this model are 0 to {self._vocab_size - 1}",
            )

    def _with_stops(self, sampling: ResolvedSampling) -> tuple[ResolvedSampling, Callable[[], StopCheck] | None]:
        """Checks stop ids, and turns stop strings that are special tokens into ids: no text ever shows them."""
        if sampling.stop_token_ids:
            self._check_range("stop_token_ids", min(sampling.stop_token_ids), max(sampling.stop_token_ids))
        if not sampling.stop:
            return sampling, None
        tokenizer = self._needs_tokenizer("a stop string")
        stop = sampling.stop
        stop_ids = (*sampling.stop_token_ids, *tokenizer.special_token_ids(stop))
        return replace(sampling, stop_token_ids=stop_ids), lambda: StopChecker(tokenizer, stop).push
