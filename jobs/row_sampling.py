"""A row's own sampling parameters."""

from dataclasses import fields

from jobs.json_words import kind, shown
from jobs.prompt_forms import MAX_TOKEN_ID
from jobs.refusal import BadRowCode, refuse
from nanovllm.sampling_params import SamplingParams

SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))

_KNOWN = frozenset(SAMPLING_KEYS)


def row_sampling(value: object) -> SamplingParams | None:
    """The `sampling` of a row; raises PromptError for a key or a value that is none."""
    if value is None:
        return None
    if not isinstance(value, dict):
        refuse(BadRowCode.BAD_SAMPLING, f"sampling is {kind(value)}, must be an object")
    for key in value:
        if key not in _KNOWN:
            refuse(
                BadRowCode.UNKNOWN_SAMPLING_KEY,
                f"sampling has no key {shown(key)}; its keys are {', '.join(SAMPLING_KEYS)}",
            )
    try:
        sampling = SamplingParams(**value)
    except ValueError as error:
        refuse(BadRowCode.BAD_SAMPLING, str(error))
    _check_size("top_k", sampling.top_k)
    _check_size("max_tokens", sampling.max_tokens)
    for token_id in sampling.stop_token_ids or ():
        if not 0 <= token_id <= MAX_TOKEN_ID:
            refuse(
                BadRowCode.BAD_SAMPLING,
                f"sampling.stop_token_ids holds {shown(token_id)}: must be from 0 to {MAX_TOKEN_ID}",
            )
    return sampling


def _check_size(name: str, number: int | None) -> None:
    """The engine keeps these numbers in 32 bits."""
    if number is not None and number > MAX_TOKEN_ID:
        refuse(BadRowCode.BAD_SAMPLING, f"sampling.{name}={shown(number)}: must be at most {MAX_TOKEN_ID}")
