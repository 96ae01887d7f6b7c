import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from nanovllm.errors import ModelError
from nanovllm.models.checkpoint import check_checkpoint
from nanovllm.models.source import resolve_model
from tests.checkpoints import qwen3_config, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty hub cache and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def write_cached(tmp_path: Path, hub_id: str, **settings: object) -> Path:
    """A snapshot as the hub's own client leaves it in its cache."""
    repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    write_checkpoint(repository / "snapshots" / COMMIT, **settings)
    return repository / "snapshots" / COMMIT


def test_a_directory_is_used_as_it_is(tmp_path):
    write_checkpoint(tmp_path / "m", tokenizer=True, generation_config={"temperature": 0.5})
    source = resolve_model(str(tmp_path / "m"))
    assert (source.name, source.directory, source.commit) == (str(tmp_path / "m"), tmp_path / "m", None)
    assert source.weight_files == (tmp_path / "m" / "model.safetensors",)
    assert source.has_tokenizer
    assert source.generation_config == {"temperature": 0.5}
    assert len(check_checkpoint(source)) == 24


def test_shards_are_found_through_the_index(tmp_path):
    write_checkpoint(tmp_path / "m", num_shards=3)
    source = resolve_model(str(tmp_path / "m"))
    assert [file.name[:11] for file in source.weight_files] == ["model-00001", "model-00002", "model-00003"]
    assert len(check_checkpoint(source)) == 24
    assert not source.has_tokenizer


def test_dummy_weights_need_only_a_config(tmp_path):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    source = resolve_model(str(tmp_path / "m"), load_format="dummy")
    assert source.weight_files == ()
    assert check_checkpoint(source) == {}


def break_nothing_there(directory):
    shutil.rmtree(directory)


def break_is_a_file(directory):
    shutil.rmtree(directory)
    directory.write_text("x")


def break_no_config(directory):
    (directory / "config.json").unlink()


def break_config_not_json(directory):
    (directory / "config.json").write_text("{'a': 1}")


def break_config_not_an_object(directory):
    (directory / "config.json").write_text("[]")


def break_config_too_deep(directory):
    (directory / "config.json").write_text("[" * 100_000)


def break_config_not_utf8(directory):
    (directory / "config.json").write_bytes(b'{"a": "\xff"}')


def break_other_architecture(directory):
    (directory / "config.json").write_text('{"model_type": "llama"}')


def break_generation_config(directory):
    (directory / "generation_config.json").write_text("nope")


def break_no_weights(directory):
    (directory / "model.safetensors").unlink()


def break_only_bin(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def break_two_sets_of_weights(directory):
    (directory / "model.safetensors.index.json").write_text("{}")


def break_code(directory):
    (directory / "modeling_qwen3.py").write_text("raise SystemExit")


REFUSED = {
    break_nothing_there: "no such directory",
    break_is_a_file: "is a file; give the directory",
    break_no_config: "no config.json in ",
    break_config_not_json: "config.json: not JSON",
    break_config_not_an_object: "config.json: not a JSON object",
    break_config_too_deep: "config.json: not JSON: nested too deeply",
    break_config_not_utf8: "config.json: not JSON",
    break_other_architecture: "model_type='llama'.*supported: qwen3",
    break_generation_config: "generation_config.json: not JSON",
    break_no_weights: "neither model.safetensors nor model.safetensors.index.json",
    break_only_bin: "'pytorch_model.bin'; safetensors only",
    break_two_sets_of_weights: "both model.safetensors and",
    break_code: r"Python code \('modeling_qwen3.py'\)",
}


@pytest.mark.parametrize("break_it", REFUSED, ids=lambda function: function.__name__)
def test_a_directory_that_is_no_model_is_refused_with_path_and_cure(tmp_path, break_it):
    directory = tmp_path / "m"
    write_checkpoint(directory)
    break_it(directory)
    with pytest.raises(ModelError, match=f"(?s)^model.path={directory}: .*{REFUSED[break_it]}"):
        resolve_model(str(directory))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody-of-that-name/x", "a/b/c", "../nowhere", "org/../../etc"])
def test_a_path_that_cannot_be_is_refused(path):
    with pytest.raises(ModelError, match=r"model.path="):
        resolve_model(path)


def test_a_revision_of_a_directory_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m")
    with pytest.raises(ModelError, match=r"model.revision=main"):
        resolve_model(str(tmp_path / "m"), revision="main")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/x.safetensors", "model.bin", "", 3, "a\\b.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, file):
    write_checkpoint(tmp_path / "m", num_shards=2)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ModelError, match=r"must be a .safetensors file beside it"):
        resolve_model(str(tmp_path / "m"))


def test_a_hub_id_comes_from_the_cache_when_offline(tmp_path):
    snapshot = write_cached(tmp_path, "owner/small", tokenizer=True)
    source = resolve_model("owner/small")
    assert (source.directory, source.commit, source.has_tokenizer) == (snapshot, COMMIT, True)
    assert len(check_checkpoint(source)) == 24


def test_a_hub_id_that_is_not_cached_is_refused_when_offline():
    with pytest.raises(ModelError, match=r"model.path=owner/absent: .*hf download owner/absent"):
        resolve_model("owner/absent")


def test_a_revision_that_is_not_cached_is_refused_when_offline(tmp_path):
    write_cached(tmp_path, "owner/small")
    with pytest.raises(ModelError, match=r"model.revision=v2"):
        resolve_model("owner/small", revision="v2")


def test_a_download_takes_no_code_and_no_pickles(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m")
    asked = {}

    def snapshot_download(path, **arguments):
        asked.update(arguments, path=path)
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve_model("owner/name", revision="v1")
    assert (asked["path"], asked["revision"]) == ("owner/name", "v1")
    files = ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "a.py", "x.bin"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, "x.pt", "original/y.safetensors"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == files[:5]


def test_a_download_for_dummy_weights_takes_no_weights(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda path, **given: asked.update(given) or str(tmp_path / "m")
    )
    resolve_model("owner/name", load_format="dummy")
    assert "*.safetensors" not in asked["allow_patterns"]


def hub_error(name: str) -> Exception:
    """One that has no HTTP response, whose construction depends on the version."""
    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind, "text")


COMPLAINTS = {
    "RepositoryNotFoundError": "no such model on the hub",
    "GatedRepoError": "accept the model's terms",
    "RevisionNotFoundError": "not model.revision=v1",
    "LocalEntryNotFoundError": "the hub cannot be reached",
    "HFValidationError": "HFValidationError",
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_what_the_hub_says_becomes_one_message_with_a_cure(monkeypatch, name):
    def snapshot_download(path, **arguments):
        raise hub_error(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=f"model.path=owner/name: .*{COMPLAINTS[name]}"):
        resolve_model("owner/name", revision="v1")


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B"])
def test_dummy_weights_of_a_named_model_need_no_network(name):
    source = resolve_model(f"Qwen/{name}", load_format="dummy")
    assert (source.directory, source.has_tokenizer, source.weight_files) == (None, False, ())
    assert source.config["vocab_size"] == 151936
    assert source.generation_config["top_k"] == 20


def test_dummy_weights_of_a_named_model_prefer_the_cached_snapshot(tmp_path):
    snapshot = write_cached(tmp_path, "Qwen/Qwen3-0.6B", tokenizer=True)
    source = resolve_model("Qwen/Qwen3-0.6B", load_format="dummy")
    assert (source.directory, source.has_tokenizer) == (snapshot, True)
    assert source.config["vocab_size"] == 320


def test_the_weights_of_a_named_model_are_not_made_up():
    with pytest.raises(ModelError, match=r"hf download Qwen/Qwen3-0.6B"):
        resolve_model("Qwen/Qwen3-0.6B")


class Canary:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("trap", ["py", "auto_map", "internal", "bin", "all"])
def test_a_hostile_directory_runs_nothing(tmp_path, trap):
    directory, canary = tmp_path / "m", tmp_path / "canary"
    config: dict[str, object] = {}
    if trap in ("auto_map", "all"):
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    if trap in ("internal", "all"):
        config["_attn_implementation_internal"] = "owner/evil"
    write_checkpoint(directory, tokenizer=True)
    (directory / "config.json").write_text(json.dumps(qwen3_config(**config)))
    if trap in ("py", "all"):
        (directory / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    if trap in ("bin", "all"):
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ModelError):
        resolve_model(str(directory))
    assert not canary.exists()
