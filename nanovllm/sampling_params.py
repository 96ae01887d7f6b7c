"""How tokens are drawn: what a user may set, and what it becomes for one row."""

import sys
from dataclasses import dataclass, fields, replace

from nanovllm.config import check_integer

MAX_TEMPERATURE = 1e6
"""Far beyond this, all logits are equal anyway and float32 overflows."""
MAX_COUNT = 2**31 - 1
"""Of tokens: what an int32 holds."""
GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: the division would leave nothing but the largest logit."""
LARGEST = sys.float_info.max
"""A larger integer has no float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a job or a row asks for; None means: not set here.

    A value that neither the row nor the job sets comes from the model's generation_config, else from
    `ResolvedSampling`'s defaults.
    """

    temperature: float | None = None
    """Divides the logits; 0 (and anything below 1e-5) takes the likeliest token, the lowest id among equals."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest."""
    max_tokens: int | None = None
    """Most tokens to sample; null: up to the model's length."""
    stop: list[str] | None = None
    """Strings that end a row; the text is cut before them."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a row, besides the model's own end-of-sequence tokens."""
    ignore_eos: bool | None = None
    """Go on after an end-of-sequence token."""
    seed: int | None = None
    """The row's own seed, instead of the job's."""

    def __post_init__(self) -> None:
        if self.temperature is not None:
            _check_number("sampling.temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if self.top_p is not None:
            _check_number("sampling.top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.min_p is not None:
            _check_number("sampling.min_p", self.min_p, 0.0, 1.0)
        if self.top_k is not None:
            check_integer("sampling.top_k", self.top_k, 0, MAX_COUNT)
        if self.max_tokens is not None:
            check_integer("sampling.max_tokens", self.max_tokens, 1, MAX_COUNT)
        if self.seed is not None:
            check_integer("sampling.seed", self.seed, 0, 2**63 - 1)
        if self.ignore_eos is not None and not isinstance(self.ignore_eos, bool):
            raise ValueError(f"sampling.ignore_eos={self.ignore_eos!r}: must be true or false")
        if self.stop is not None:
            object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))

    def over(self, base: "SamplingParams") -> "SamplingParams":
        """These values where they are set, else those of `base`, key by key."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(base, **mine)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling:
    """One row's sampling with nothing left open."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1


def resolve(params: SamplingParams, model_defaults: SamplingParams, seed: int) -> ResolvedSampling:
    """Fill `params` from the model's defaults, then from ResolvedSampling's; `seed` is the job's."""
    merged = params.over(model_defaults)
    values = {f.name: getattr(merged, f.name) for f in fields(merged) if getattr(merged, f.name) is not None}
    for name in ("stop", "stop_token_ids"):
        if name in values:
            values[name] = tuple(values[name])
    return ResolvedSampling(**{"seed": seed, **values})


def _check_number(key: str, value: float, low: float, high: float = LARGEST, open_low: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high) or (open_low and value == low):
        bound = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < LARGEST else "")
        raise ValueError(f"{key}={value!r}: must be a number, {bound}")


def _stop_strings(stop: object) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"sampling.stop={stop!r}: must be a non-empty string or a list of them")
    return list(strings)


def _token_ids(ids: object) -> list[int]:
    if not isinstance(ids, list | tuple) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_COUNT for i in ids
    ):
        raise ValueError(f"sampling.stop_token_ids={ids!r}: must be a list of token ids, 0 to {MAX_COUNT}")
    return list(ids)
