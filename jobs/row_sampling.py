"""A row's own sampling parameters."""

from dataclasses import fields

from jobs.field_limits import MAX_STOP_CHARS, MAX_STOP_IDS, MAX_STOPS, check_count, check_length
from jobs.json_words import kind, shown
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
        params = SamplingParams(**value)
    except ValueError as error:
        refuse(BadRowCode.BAD_SAMPLING, str(error))
    check_count("sampling.stop", len(params.stop or ()), MAX_STOPS)
    check_count("sampling.stop_token_ids", len(params.stop_token_ids or ()), MAX_STOP_IDS)
    for text in params.stop or ():
        check_length("a string of sampling.stop", text, MAX_STOP_CHARS)
    return params
