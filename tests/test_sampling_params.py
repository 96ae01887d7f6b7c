import dataclasses
import math
import re
from fractions import Fraction

import pytest

from nanovllm.sampling_params import ResolvedSampling, SamplingParams, resolve

FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
TOO_LARGE = 10**400
NO_NUMBERS = (math.nan, math.inf, -math.inf, TOO_LARGE, -TOO_LARGE, True, False, "1", "", [1], {}, 1j, Fraction(1, 2))
NO_INTEGERS = (-1, 1.0, 0.5, math.nan, math.inf, True, False, "1", [1])

# field: (what it must be, values that it takes, values that it refuses)
RANGES: dict[str, tuple[str, tuple, tuple]] = {
    "temperature": (
        "a number, at least 0 and at most 1e+06",
        (0, 0.0, -0.0, 5e-324, 1e-5, 0.7, 1, 2.0, 10**6, 1e6),
        (-1, -5e-324, 1e6 + 1, 1e308, *NO_NUMBERS),
    ),
    "top_p": (
        "a number, above 0 and at most 1",
        (5e-324, 0.5, 1, 1.0),
        (0, 0.0, -0.0, -0.1, 1.0000000000000002, 2, *NO_NUMBERS),
    ),
    "top_k": ("an integer from 0 to 2147483647", (0, 1, 50, 2**31 - 1), (2**31, TOO_LARGE, *NO_INTEGERS)),
    "min_p": (
        "a number, at least 0 and at most 1",
        (0, 0.0, -0.0, 0.05, 1, 1.0),
        (-5e-324, 1.0000000000000002, 2, *NO_NUMBERS),
    ),
    "max_tokens": ("an integer from 1 to 2147483647", (1, 2, 2**31 - 1), (0, 2**31, TOO_LARGE, *NO_INTEGERS)),
    "stop": (
        "a non-empty string or a list of them",
        ([], ["a"], ["a", "a", "\n\n", "😀"], ["\x00"]),
        ("", [""], ["a", ""], ["a", None], [1], 1, True, b"a", {"a": 1}, {"a"}),
    ),
    "stop_token_ids": (
        "a list of token ids, 0 to 2147483647",
        ([], [0], [1, 1, 2**31 - 1]),
        (1, "1", ["1"], [1.0], [None], [0, True], [-1], [2**31], {1: 1}, {1}),
    ),
    "ignore_eos": ("true or false", (True, False), (0, 1, "true", "", [], 1.0)),
    "seed": (f"an integer from 0 to {2**63 - 1}", (0, 1, 2**63 - 1), (2**63, TOO_LARGE, *NO_INTEGERS)),
}

SET = SamplingParams(
    temperature=0.5,
    top_p=0.9,
    top_k=3,
    min_p=0.1,
    max_tokens=7,
    stop=["x"],
    stop_token_ids=[4],
    ignore_eos=True,
    seed=5,
)
SET_TO_NOTHING = SamplingParams(
    temperature=0, top_p=1, top_k=0, min_p=0, max_tokens=1, stop=[], stop_token_ids=[], ignore_eos=False, seed=0
)


def test_every_field_has_a_range() -> None:
    assert tuple(RANGES) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_none_means_not_set(name: str) -> None:
    assert getattr(SamplingParams(), name) is None
    assert SamplingParams(**{name: None}) == SamplingParams()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in RANGES for value in RANGES[name][1]])
def test_a_value_within_its_range_is_kept_as_given(name: str, value: object) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={value!r:.20}-{index}")
        for name in RANGES
        for index, value in enumerate(RANGES[name][2])
    ],
)
def test_a_value_out_of_its_range_is_refused_with_key_value_and_range(name: str, value: object) -> None:
    expected = f"sampling.{name}={value!r}: must be {RANGES[name][0]}"
    with pytest.raises(ValueError, match=rf"\A{re.escape(expected)}\Z"):
        SamplingParams(**{name: value})


def test_an_integer_that_no_float_holds_is_refused_like_other_numbers() -> None:
    """It used to be an OverflowError, from the conversion inside math.isfinite."""
    for name in ("temperature", "top_p", "min_p"):
        with pytest.raises(ValueError, match=rf"\Asampling\.{name}=10+: must be a number, "):
            SamplingParams(**{name: TOO_LARGE})


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)


def test_stop_given_as_a_string_becomes_a_list() -> None:
    assert SamplingParams(stop="ab").stop == ["ab"]
    assert SamplingParams(stop="ab") == SamplingParams(stop=["ab"])


@pytest.mark.parametrize(("name", "values"), [("stop", ["a", "b"]), ("stop_token_ids", [1, 2])])
def test_lists_are_copies_and_tuples_become_lists(name: str, values: list) -> None:
    given = list(values)
    params = SamplingParams(**{name: given})
    given.append(given[0])
    assert getattr(params, name) == values
    assert getattr(SamplingParams(**{name: tuple(values)}), name) == values


@pytest.mark.parametrize("params", [SamplingParams(), ResolvedSampling()], ids=["asked for", "resolved"])
def test_parameters_are_immutable(params: SamplingParams | ResolvedSampling) -> None:
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(params, name, None)
    with pytest.raises((AttributeError, TypeError)):
        params.other = 1  # type: ignore[union-attr]


def test_over_keeps_what_is_set_and_takes_the_rest_from_the_base() -> None:
    for name in FIELDS:
        mine = SamplingParams(**{name: getattr(SET_TO_NOTHING, name)})
        merged = mine.over(SET)
        assert getattr(merged, name) == getattr(SET_TO_NOTHING, name), "0, false and an empty list are set"
        for other in set(FIELDS) - {name}:
            assert getattr(merged, other) == getattr(SET, other)


def test_over_has_an_identity_and_changes_neither_side() -> None:
    empty = SamplingParams()
    assert SET.over(empty) == empty.over(SET) == SET.over(SET) == SET
    assert empty.over(empty) == empty == SamplingParams()
    merged = empty.over(SET)
    assert merged.stop is not None
    merged.stop.append("y")
    assert SET.stop == ["x"]


def test_over_is_associative() -> None:
    layers = (SamplingParams(top_k=1, stop="a"), SamplingParams(top_k=2, seed=2), SamplingParams(stop="c", min_p=0.3))
    first, second, third = layers
    assert first.over(second).over(third) == first.over(second.over(third))


def test_resolve_takes_the_row_then_the_model_then_the_defaults() -> None:
    row = SamplingParams(temperature=0.0, stop="a")
    model = SamplingParams(temperature=0.6, top_k=20, stop=["b"], stop_token_ids=[1, 2])
    assert resolve(row, model, seed=9) == ResolvedSampling(
        temperature=0.0, top_k=20, stop=("a",), stop_token_ids=(1, 2), seed=9
    )


def test_resolve_leaves_nothing_open() -> None:
    nothing = resolve(SamplingParams(), SamplingParams(), seed=3)
    assert nothing == ResolvedSampling(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=None,
        stop=(),
        stop_token_ids=(),
        ignore_eos=False,
        seed=3,
    )
    everything = resolve(SET, SamplingParams(), seed=3)
    assert dataclasses.asdict(everything) == dataclasses.asdict(SET) | {"stop": ("x",), "stop_token_ids": (4,)}
    assert hash(everything) == hash(resolve(SET, SamplingParams(), seed=4)), "what is resolved holds no lists"


def test_a_seed_that_is_set_goes_before_the_jobs() -> None:
    assert resolve(SamplingParams(seed=0), SamplingParams(seed=8), seed=9).seed == 0
    assert resolve(SamplingParams(), SamplingParams(), seed=9).seed == 9


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 9e-6}, True),
        ({"temperature": 1e-5}, False),
        ({"top_k": 1}, True),
        ({"top_k": 0}, False),
        ({"top_k": 2}, False),
    ],
)
def test_sampling_is_greedy_without_temperature_or_choice(params: dict, greedy: bool) -> None:
    assert resolve(SamplingParams(**params), SamplingParams(), seed=0).greedy is greedy
