"""From words such as kv.block_size=16,64 to the configurations that they span."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from jobs import complaints
from jobs.simulation.settings import KEYS, Settings
from jobs.usage import UsageError

MOST_CONFIGURATIONS = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """One configuration of a grid."""

    overrides: dict[str, object]
    settings: Settings | None
    """None where these values do not go together."""
    complaint: str = ""

    @property
    def words(self) -> str:
        """What the command line of a job would say."""
        return " ".join(f"{key}={_word(value)}" for key, value in self.overrides.items())


def span(words: Sequence[str], recorded: Settings, most_len: int | None) -> list[Choice]:
    """Every combination, the last key changing fastest. UsageError where not one of them can be.

    `most_len` is the most that engine.max_model_len can be, if that is known.
    """
    values = _values(words)
    choices = [
        _choice(dict(zip(values, combination, strict=True)), recorded, most_len)
        for combination in _product(list(values.values()))
    ]
    if all(choice.settings is None for choice in choices):
        raise UsageError(choices[0].complaint)
    return choices


def search_words(recorded: Settings) -> list[str]:
    """What a search looks at where it is not told: block sizes, and both limits of a step around the recorded ones."""
    seqs, tokens = recorded.max_num_seqs, recorded.max_num_batched_tokens
    return [
        "kv.block_size=16,32,64",
        f"engine.max_num_seqs={','.join(str(max(1, n)) for n in (seqs // 2, seqs, 2 * seqs, 4 * seqs))}",
        f"engine.max_num_batched_tokens={','.join(str(max(1, n)) for n in (tokens // 2, tokens, 2 * tokens))}",
    ]


def _choice(overrides: dict[str, object], recorded: Settings, most_len: int | None) -> Choice:
    try:
        settings = recorded.changed(overrides)
        if most_len is not None and settings.max_model_len > most_len:
            raise ValueError(
                f"engine.max_model_len={settings.max_model_len}: must be at most {most_len}, the model's "
                "max_position_embeddings"
            )
    except ValueError as error:
        return Choice(overrides, None, str(error))
    return Choice(overrides, settings)


def _values(words: Sequence[str]) -> dict[str, list[object]]:
    """The values of each key; the last of several words for a key counts."""
    parser = OverridesParser.create()
    values: dict[str, list[object]] = {}
    for word in words:
        key = word.partition("=")[0].strip()
        if key not in KEYS:
            raise UsageError(f"{complaints.shown(word)}: cannot be simulated; what can be is {', '.join(KEYS)}")
        try:
            (override,) = parser.parse_overrides([word])
        except HydraException as error:
            raise UsageError(complaints.bad_syntax(word, str(error))) from error
        values.pop(key, None)
        values[key] = _values_of(override)
    return values


def _values_of(override: Override) -> list[object]:
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep():
        raise UsageError(
            f"{complaints.shown(override)}: an interval cannot be swept; list its values, or range(a,b,step)"
        )
    values: list[object] = list(override.sweep_iterator())
    if not values:
        raise UsageError(f"{complaints.shown(override)}: names no value")
    return values


def _product(values: Sequence[list[object]]) -> Iterator[tuple[object, ...]]:
    count = 1
    for each in values:
        count *= len(each)
    if count > MOST_CONFIGURATIONS:
        raise UsageError(f"these words span {count:,} configurations; at most {MOST_CONFIGURATIONS:,} are simulated")
    return itertools.product(*values)


def _word(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
