"""The engine from Python."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from nanovllm.assembly import assemble
from nanovllm.config import EngineConfig, KVConfig, LLMConfig, ModelConfig, ParallelConfig
from nanovllm.engine.llm_engine import SequenceOutput
from nanovllm.errors import PromptError
from nanovllm.events import Recorder
from nanovllm.intake import Request
from nanovllm.prompts import RESERVED_KWARGS, Conversation
from nanovllm.quiet_gc import collector_kept_out
from nanovllm.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, object]

SETTINGS = {
    "dtype": ("model", "dtype"),
    "load_format": ("model", "load_format"),
    "revision": ("model", "revision"),
    "tensor_parallel_size": ("parallel", "tensor_parallel_size"),
    "max_model_len": ("engine", "max_model_len"),
    "max_num_seqs": ("engine", "max_num_seqs"),
    "max_num_batched_tokens": ("engine", "max_num_batched_tokens"),
    "enforce_eager": ("engine", "enforce_eager"),
    "kernels": ("engine", "kernels"),
    "attention": ("engine", "attention"),
    "kv_memory_fraction": ("kv", "memory_fraction"),
    "enable_prefix_caching": ("kv", "prefix_caching"),
    "block_size": ("kv", "block_size"),
    "kvcache_block_size": ("kv", "block_size"),
    "num_gpu_blocks_override": ("kv", "num_blocks"),
    "num_kvcache_blocks": ("kv", "num_blocks"),
    "seed": ("", "seed"),
    "device": ("", "device"),
}
"""Flat names (vLLM's where it has one, and nano-vllm's) -> group and key of the job configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One sample."""

    index: int
    text: str | None
    """None when the model has no tokenizer."""
    token_ids: list[int]
    finish_reason: str
    """stop or length; error where the model's logits were not finite."""
    logprobs: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What became of one prompt."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def text(self) -> str | None:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason


class LLM:
    """A model and its engine: `LLM("path-or-hub-id", dtype="bfloat16").generate(["Hello"])`.

    `settings` are those of SETTINGS; an unknown one raises TypeError, a value out of range ValueError. `recorders`
    learn of every step.
    """

    def __init__(self, model: str, *, recorders: Sequence[Recorder] = (), **settings: object) -> None:
        self._assembly = assemble(_config(model, settings), recorders=recorders)
        self._engine = self._assembly.engine
        self._intake = self._assembly.intake

    @property
    def tokenizer(self) -> object:
        """The model's tokenizer, None if it has none."""
        return self._intake.tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids); results in the prompts' order.

        One SamplingParams for all, or one for each. Raises ValueError before anything is generated if a prompt
        cannot be served, naming its index. A prompt's noise depends on its seed and index alone.
        """
        listed: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._generate([self._ids(i, p) for i, p in enumerate(listed)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: Mapping[str, object] | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them, through the model's chat template.

        The last three hold for all of them: further variables of the template (`{"enable_thinking": False}`), whether
        the model goes on with the last message, and the functions that it may call, as JSON schemas. A template is a
        stranger's program: it runs in Jinja's sandbox, in a process whose time and memory are bounded.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        reserved = sorted(RESERVED_KWARGS & set(chat_template_kwargs or ()))
        if reserved:
            raise ValueError(
                f"chat_template_kwargs has {', '.join(reserved)}, which no template variable may be called"
            )
        conversations = [
            Conversation(
                messages=_messages(index, conversation),
                tools=None if tools is None else [dict(tool) for tool in tools],
                template_kwargs=dict(chat_template_kwargs or {}),
                continue_final_message=continue_final_message,
            )
            for index, conversation in enumerate([messages] if one else messages)
        ]
        ids = [_or_raise(index, ids) for index, ids in enumerate(self._intake.prepare(conversations))]
        return self._generate(ids, sampling_params, use_tqdm)

    def _generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(prompts))
        requests = [self._request(i, ids, p) for i, (ids, p) in enumerate(zip(prompts, params, strict=True))]
        outputs = self._run(requests, use_tqdm)
        return [
            RequestOutput(prompt_token_ids=request.token_ids.tolist(), outputs=[self._completion(output)])
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _ids(self, index: int, prompt: object) -> Sequence[int]:
        """Token ids of a text, or the ones given; raises ValueError for what is neither, or cannot be tokenised."""
        if isinstance(prompt, str):
            try:
                return self._intake.encode(prompt)
            except PromptError as error:
                raise ValueError(f"prompt {index}: {error.reason}") from error
        if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes):
            ids = list(prompt)
            if all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in ids):
                return [int(i) for i in ids]
        raise ValueError(f"prompt {index}: {reprlib.repr(prompt)} is neither a string nor a list of token ids")

    def _request(self, index: int, ids: Sequence[int] | np.ndarray, params: SamplingParams) -> Request:
        try:
            return self._intake.request(ids, sampling=params, row=index, request_id=str(index))
        except PromptError as error:
            raise ValueError(f"prompt {index}: {error.reason}") from error

    def _run(self, requests: Sequence[Request], use_tqdm: bool) -> list[SequenceOutput]:
        engine = self._engine
        for recorder in engine.recorders:
            recorder.on_start(len(requests), sum(len(r.token_ids) for r in requests), None)
        finished: dict[int, SequenceOutput] = {}
        try:
            for request in requests:
                self._intake.add(request)
            bar = tqdm(total=len(requests), desc="Generating", unit="row", disable=not use_tqdm)
            with bar, collector_kept_out() as between_steps:
                while engine.has_work():
                    for output in engine.step():
                        finished[output.row] = output
                        bar.update()
                    between_steps()
        except BaseException:
            engine.abort_all()
            raise
        for recorder in engine.recorders:
            recorder.on_end()
        return [finished[row] for row in range(len(requests))]

    def _completion(self, output: SequenceOutput) -> CompletionOutput:
        return CompletionOutput(
            index=output.sample,
            text=self._intake.text(output),
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
        )


def _messages(index: int, messages: object) -> list[dict[str, object]]:
    """Raises ValueError for what is no conversation."""
    listed = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str | bytes) else []
    if not listed or not all(isinstance(message, Mapping) for message in listed):
        raise ValueError(f"prompt {index}: messages must be a non-empty list of objects with role and content")
    return [dict(message) for message in listed]


def _or_raise(index: int, prepared: np.ndarray | PromptError) -> np.ndarray:
    if isinstance(prepared, PromptError):
        raise ValueError(f"prompt {index}: {prepared.reason}") from prepared
    return prepared


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError("sampling_params must be a SamplingParams, or a sequence of them")
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one, or one for each prompt")
    return list(params)


def _config(model: str, settings: Mapping[str, object]) -> LLMConfig:
    groups: dict[str, dict[str, object]] = {"model": {"path": model}, "parallel": {}, "kv": {}, "engine": {}, "": {}}
    for name, value in settings.items():
        if name not in SETTINGS:
            raise TypeError(f"LLM() got an unknown setting {name!r}; known ones: {', '.join(sorted(SETTINGS))}")
        group, key = SETTINGS[name]
        if key in groups[group]:
            raise TypeError(f"LLM() got {name!r} and another name for the same setting")
        groups[group][key] = value
    return LLMConfig(
        model=ModelConfig(**groups["model"]),  # pyright: ignore[reportArgumentType]
        parallel=ParallelConfig(**groups["parallel"]),  # pyright: ignore[reportArgumentType]
        kv=KVConfig(**groups["kv"]),  # pyright: ignore[reportArgumentType]
        engine=EngineConfig(**groups["engine"]),  # pyright: ignore[reportArgumentType]
        **groups[""],  # pyright: ignore[reportArgumentType]
    )
