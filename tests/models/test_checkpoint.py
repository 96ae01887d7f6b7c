import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanovllm.errors import ModelError
from nanovllm.models.checkpoint import check_checkpoint
from nanovllm.models.source import resolve_model
from tests.checkpoints import write_checkpoint

HEADER = 8
NORM = "model.norm.weight"


def rewrite_header(file: Path, change) -> None:
    """Let `change` edit the parsed header; the data stays as it is."""
    data = file.read_bytes()
    length = int.from_bytes(data[:HEADER], "little")
    header = json.loads(data[HEADER : HEADER + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(HEADER, "little") + text + data[HEADER + length :])


def lose_the_norm(header):
    header["model.norn.weight"] = header.pop(NORM)


def shift_an_offset(header):
    header[NORM]["data_offsets"] = [offset + 4 for offset in header[NORM]["data_offsets"]]


def overlap(header):
    header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


def huge_shape(header):
    header[NORM]["shape"] = [2**62, 2**62]


def negative_shape(header):
    header[NORM]["shape"] = [-32]


def other_dtype(header):
    header[NORM]["dtype"] = "F8_E4M3"


def other_shape(header):
    header[NORM]["shape"] = [4, 8]


def no_object(header):
    header[NORM] = 3


HEADER_CHANGES = {
    lose_the_norm: f"no tensor '{NORM}'",
    shift_an_offset: "an overlap or a gap",
    overlap: "an overlap or a gap",
    huge_shape: "do not fit",
    negative_shape: "integers of at least 0",
    other_dtype: "has the dtype 'F8_E4M3'",
    other_shape: rf"'{NORM}' has the shape \[4, 8\]; config.json calls for \[32\]",
    no_object: "not an object",
}


@pytest.mark.parametrize("change", HEADER_CHANGES, ids=lambda function: function.__name__)
def test_a_header_that_lies_is_refused_before_the_run(tmp_path, change):
    write_checkpoint(tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"))
    rewrite_header(source.weight_files[0], change)
    with pytest.raises(ModelError, match=HEADER_CHANGES[change]):
        check_checkpoint(source)


def test_a_tensor_name_that_occurs_twice_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"))
    file = source.weight_files[0]
    name = b"model.layers.1.input_layernorm.weight"
    file.write_bytes(file.read_bytes().replace(name, name.replace(b"1", b"0")))
    with pytest.raises(ModelError, match=r"'model.layers.0.input_layernorm.weight' occurs twice"):
        check_checkpoint(source)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_b64_a_truncated_file_is_refused_before_the_run(tmp_path, keep):
    write_checkpoint(tmp_path / "m", num_shards=2)
    source = resolve_model(str(tmp_path / "m"))
    file = source.weight_files[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"{file.name}: .*truncated"):
        check_checkpoint(source)


def test_b64_a_missing_shard_is_refused_before_the_run(tmp_path):
    write_checkpoint(tmp_path / "m", num_shards=3)
    source = resolve_model(str(tmp_path / "m"))
    source.weight_files[1].unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003.safetensors: the file is missing"):
        check_checkpoint(source)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    write_checkpoint(tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"))
    with source.weight_files[0].open("ab") as stream:
        stream.write(b"\0" * 3)
    with pytest.raises(ModelError, match="3 bytes after the last tensor"):
        check_checkpoint(source)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m", num_shards=2)
    source = resolve_model(str(tmp_path / "m"))
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole.items() if k != NORM}}))
    with pytest.raises(ModelError, match=f"'{NORM}' is not in"):
        check_checkpoint(source)
    index.write_text(json.dumps({"weight_map": whole | {"model.extra": source.weight_files[0].name}}))
    with pytest.raises(ModelError, match=r"no tensor 'model.extra', which"):
        check_checkpoint(source)


def mutate(data: bytes, length: int, rng: random.Random) -> bytes:
    """One to three edits in the header or its length: bytes, digits, cuts, repeats, a new length."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(HEADER + length)
        match rng.randrange(6):
            case 0:
                changed[at % len(changed)] = rng.randrange(256)
            case 1:
                digits = [i for i, byte in enumerate(changed[: HEADER + length]) if chr(byte).isdigit()]
                changed[rng.choice(digits or [0])] = rng.choice(b"0123456789-.e[")
            case 2:
                del changed[at : at + rng.randint(1, 40)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 40)]
            case 4:
                changed[:HEADER] = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(
                    8, "little"
                )
            case 5:
                token = rng.choice([b"null", b"1e999", b"NaN", b"[[", b'"\\ud800"', b"9" * 5000, b"true", b"{}"])
                changed[at : at + len(token)] = token
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def test_a_mutated_header_is_refused_or_reads_as_safetensors_reads_it(tmp_path):
    rng = random.Random(0)
    write_checkpoint(tmp_path / "m", num_hidden_layers=1, vocab_size=4, hidden_size=2, intermediate_size=2, head_dim=2)
    source = resolve_model(str(tmp_path / "m"))
    file = source.weight_files[0]
    data = file.read_bytes()
    length = int.from_bytes(data[:HEADER], "little")
    refused = 0
    for _ in range(1500):
        file.write_bytes(mutate(data, length, rng))
        try:
            tensors = check_checkpoint(source)
        except ModelError:
            refused += 1
            continue
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == set(tensors)
            assert all(opened.get_tensor(name).shape == torch.Size(t.shape) for name, t in tensors.items())
    assert 750 < refused < 1500, "the mutations must be neither all harmless nor all fatal"
