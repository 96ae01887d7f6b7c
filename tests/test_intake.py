"""Token ids as callers hand them over."""

from typing import Any

import numpy as np
import pytest

from nanovllm.errors import PromptError
from nanovllm.intake import Intake
from nanovllm.sampling_params import SamplingParams
from tests.runner.harness import build


@pytest.fixture(scope="module")
def intake() -> Intake:
    return build("tiny").assembly.intake


def ids_of(intake: Intake, token_ids: Any) -> list[int]:
    return intake.request(token_ids, sampling=SamplingParams(max_tokens=2), row=0).token_ids.tolist()


@pytest.mark.parametrize("dtype", [None, np.int32, np.int64, np.uint16])
def test_ids_come_in_any_sequence(intake: Intake, dtype: type | None) -> None:
    ids = [5, 0, 7]
    assert ids_of(intake, ids if dtype is None else np.array(ids, dtype)) == ids
    assert ids_of(intake, tuple(ids)) == ids


FAR = [-1, 10**6, 2**31, 2**32 + 5, -(2**63)]


@pytest.mark.parametrize(
    ("wrong", "as_array"), [(2**70, False), *((far, kind) for far in FAR for kind in (False, True))]
)
def test_an_id_out_of_range_is_named(intake: Intake, wrong: int, as_array: bool) -> None:
    """However far out it is; none comes back around into the range."""
    ids = [5, wrong, 7]
    with pytest.raises(PromptError, match=rf"holds {wrong}; ids of this model are 0 to"):
        ids_of(intake, np.array(ids, np.int64) if as_array else ids)


@pytest.mark.parametrize("ids", [[[1, 2]], [np.array([1, 2])], np.array([[1, 2]])])
def test_nested_ids_are_refused(intake: Intake, ids: Any) -> None:
    with pytest.raises(TypeError, match="2 dimensions, must be a flat sequence"):
        ids_of(intake, ids)
