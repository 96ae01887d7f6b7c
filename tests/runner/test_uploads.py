"""What is sent is what arrives, and nothing of an earlier step stays behind."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from nanovllm.runner.uploads import FixedInputs, Padding, Uploader, lay_out

CPU = torch.device("cpu")
DTYPES = [np.int32, np.int64]


def random_array(rng: np.random.Generator, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max, shape, dtype, endpoint=True)


def random_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of up to 9 names; some are empty, as the new table entries of most decode steps are."""
    return {
        f"array {i}": random_array(
            rng, DTYPES[rng.integers(2)], tuple(rng.integers(0, 8, int(rng.integers(1, 4))).tolist())
        )
        for i in range(int(rng.integers(1, 10)))
    }


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_aligned_in_order_and_do_not_overlap(seed: int) -> None:
    arrays = random_arrays(np.random.default_rng(seed))
    segments = lay_out({name: (array.dtype, array.shape) for name, array in arrays.items()})
    assert list(segments) == list(arrays)
    end = 0
    for name, segment in segments.items():
        assert segment.begin % 16 == 0  # what a device reads at once
        assert end <= segment.begin < end + 16, "segments overlap, or leave a gap for nothing"
        end = segment.end
        assert end - segment.begin == arrays[name].nbytes


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_through_arrays_is_read_through_tensors(seed: int) -> None:
    """As a send to a GPU does, but for the copy between them."""
    arrays = random_arrays(np.random.default_rng(seed))
    segments = lay_out({name: (array.dtype, array.shape) for name, array in arrays.items()})
    buffer = np.zeros(max(segment.end for segment in segments.values()), np.uint8)
    for name, array in arrays.items():
        segments[name].in_array(buffer)[...] = array
    for name, array in arrays.items():
        read = segments[name].in_tensor(torch.from_numpy(buffer)).numpy()
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array, strict=True)


@pytest.mark.parametrize("seed", range(10))
def test_an_upload_keeps_values_shapes_and_types(seed: int) -> None:
    rng = np.random.default_rng(seed)
    uploader = Uploader(CPU, depth=2)
    for _ in range(4):
        arrays = random_arrays(rng) | {"strided": random_array(rng, np.int64, (10, 6))[::2, 1::3]}
        tensors = uploader.send(arrays)
        assert list(tensors) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[name].numpy(), array, strict=True)
            assert tensors[name].is_contiguous()


INPUTS = {
    "ids": Padding(np.int64, (24,), -7),
    "positions": Padding(np.int32, (24,), 0),
    "counts": Padding(np.int32, (4,), 0),
    "merges": Padding(np.int32, (9, 3), -1),
    "items": Padding(np.int32, (50, 8), 0),
}
LAST = "items"


def random_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Some missing, some empty, some full."""
    arrays = {}
    for name, padding in INPUTS.items():
        capacity = padding.shape[0]
        count = int(rng.choice([0, capacity, int(rng.integers(0, capacity + 1))]))
        if rng.random() < 0.8:
            arrays[name] = random_array(rng, padding.dtype, (count, *padding.shape[1:]))
    return arrays


def assert_hold(inputs: FixedInputs, arrays: dict[str, np.ndarray]) -> None:
    """The arrays, then nothing but padding; behind the last one's, anything."""
    for name, padding in INPUTS.items():
        held = inputs.tensors[name].numpy()
        assert (held.dtype, held.shape) == (padding.dtype, padding.shape)
        array = arrays.get(name, np.empty((0, *padding.shape[1:]), padding.dtype))
        np.testing.assert_array_equal(held[: len(array)], array, err_msg=name)
        if name != LAST:
            assert (held[len(array) :] == padding.fill).all(), (
                f"{name}: something else than padding behind what is sent"
            )


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_fixed_inputs_hold_what_was_sent_last_then_padding(seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = FixedInputs(INPUTS, CPU, depth)
    for _ in range(30):
        arrays = random_inputs(rng)
        inputs.send(arrays)
        assert_hold(inputs, arrays)


@pytest.mark.parametrize("depth", [1, 2])
def test_padding_covers_a_longer_step_that_went_before(depth: int) -> None:
    inputs = FixedInputs(INPUTS, CPU, depth)
    longest = {name: np.full(padding.shape, 99, padding.dtype) for name, padding in INPUTS.items()}
    for _ in range(depth):
        inputs.send(longest)
    assert_hold(inputs, longest)
    for _ in range(depth):
        inputs.send({})
        assert_hold(inputs, {})


def test_tensors_stay_at_their_addresses_apart_from_each_other() -> None:
    rng = np.random.default_rng(0)
    inputs = FixedInputs(INPUTS, CPU, 2)
    tensors = dict(inputs.tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for _ in range(5):
        inputs.send(random_inputs(rng))
        assert {name: tensor.data_ptr() for name, tensor in inputs.tensors.items()} == addresses
        assert all(inputs.tensors[name] is tensor for name, tensor in tensors.items())
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("beyond", [1, 100])
def test_more_than_there_is_room_for_is_refused(name: str, beyond: int) -> None:
    inputs = FixedInputs(INPUTS, CPU, 2)
    padding = INPUTS[name]
    too_long = np.ones((padding.shape[0] + beyond, *padding.shape[1:]), padding.dtype)
    before = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    with pytest.raises(ValueError, match="could not broadcast"):
        inputs.send({name: too_long})
    assert all(torch.equal(inputs.tensors[name], tensor) for name, tensor in before.items())
    arrays = random_inputs(np.random.default_rng(1))
    for _ in range(2):
        inputs.send(arrays)
        assert_hold(inputs, arrays)


def test_the_last_input_is_copied_no_further_than_it_is_filled() -> None:
    """Its worst case is far longer than a step's: copying it whole would cost each step."""
    inputs = FixedInputs(INPUTS, CPU, 1)
    inputs.send({LAST: np.full((50, 8), 5, np.int32)})
    inputs.send({LAST: np.full((20, 8), 6, np.int32)})
    held = inputs.tensors[LAST].numpy()
    assert (held[:20] == 6).all()
    inputs.tensors[LAST][20:] = 77  # what stands on the device, and not in the buffer it is filled from
    inputs.send({LAST: np.full((10, 8), 7, np.int32)})
    assert (held[:10] == 7).all()
    assert (held[20:] == 77).all()
