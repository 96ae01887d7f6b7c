"""manifest.json, the clock and the masking of secrets."""

import errno
import json
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from jobs import provenance
from jobs.clock import Clock
from jobs.command import CHECKOUT
from jobs.manifest import COMPLETE, Manifest
from jobs.masking import MASK, Masker, smells_of_secret


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def create(directory: Path, **facts: Any) -> Manifest:
    return Manifest.create(directory, Clock(), facts)


def tree(**values: Any) -> DictConfig:
    return OmegaConf.create(values)


def test_the_first_version_says_running_and_holds_the_config(tmp_path: Path):
    create(tmp_path, config={"seed": 1})
    content = read(tmp_path)
    assert (content["status"], content["exit_code"], content["config"]) == ("running", None, {"seed": 1})
    assert content["attempts"][0]["phases"] == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"], "no temporary file is left"


def test_the_clocks_zero_is_a_wall_clock_time_and_its_readings_count_from_there():
    before = datetime.now(UTC)
    clock = Clock()
    first, second = clock.now_ns(), clock.now_ns()
    assert before <= clock.zero <= datetime.now(UTC)
    assert 0 <= first <= second < 10**9


def test_a_manifest_is_never_replaced_by_another_run(tmp_path: Path):
    create(tmp_path, config="first")
    with pytest.raises(FileExistsError):
        create(tmp_path, config="second")
    assert read(tmp_path)["config"] == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_filesystem_without_hard_links_is_claimed_exclusively_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    create(tmp_path, config="first")
    with pytest.raises(FileExistsError):
        create(tmp_path, config="second")
    assert read(tmp_path)["config"] == "first"


def test_phases_are_recorded_in_order_also_when_one_fails(tmp_path: Path):
    manifest = create(tmp_path)
    with manifest.phase("load"):
        pass
    with pytest.raises(RuntimeError), manifest.phase("generate"):
        raise RuntimeError
    load, generate = read(tmp_path)["attempts"][0]["phases"]
    assert (load["name"], generate["name"]) == ("load", "generate")
    assert 0 <= load["start_ns"] <= load["end_ns"] <= generate["start_ns"] <= generate["end_ns"]


def test_the_job_adds_fields_but_not_the_manifests_own(tmp_path: Path):
    manifest = create(tmp_path)
    manifest.record(counts={"rows": 3}, device="cpu")
    assert read(tmp_path)["counts"] == {"rows": 3}
    with pytest.raises(ValueError, match="exit_code"):
        manifest.record(exit_code=0)


def test_the_end_is_written_down(tmp_path: Path):
    manifest = create(tmp_path)
    manifest.finish(COMPLETE, 3)
    content = read(tmp_path)
    assert (content["status"], content["exit_code"], content["error"]) == ("complete", 3, None)
    assert content["attempts"][0]["ended"] is not None
    with pytest.raises(ValueError, match="status=done"):
        manifest.finish("done", 0)


def test_another_attempt_is_listed_and_keeps_what_the_one_before_it_said(tmp_path: Path):
    create(tmp_path, config={"seed": 1}, command=["a"], overrides=["seed=1"]).record(counts={"rows": 3}, figures=1)
    manifest = Manifest.load(tmp_path)
    assert manifest.attempt == 0
    manifest.resume(Clock(), {"config": {"seed": 2}, "command": ["b"], "overrides": ["x=y"]})
    content = read(tmp_path)
    assert (content["status"], content["command"], content["config"]) == ("running", ["a"], {"seed": 2})
    assert content["counts"] == {"rows": 3}
    assert "figures" not in content, "they are of an attempt"
    assert "overrides" not in content
    first, second = content["attempts"]
    assert (first["status"], first["ended"], first["config"], first["figures"]) == ("killed", None, {"seed": 1}, 1)
    assert (second["attempt"], second["command"], second["overrides"]) == (1, ["b"], ["x=y"])
    with manifest.phase("load"):
        pass
    manifest.record_attempt(last_step=7)
    manifest.finish(COMPLETE, 0)
    first, second = read(tmp_path)["attempts"]
    assert (second["status"], second["exit_code"], second["last_step"]) == ("complete", 0, 7)
    assert (len(first["phases"]), len(second["phases"])) == (0, 1)


def test_a_resumed_clock_counts_from_the_first_ones_zero_and_never_back():
    zero = datetime.now(UTC) - timedelta(seconds=100)
    assert 100e9 <= Clock.resumed(zero, 5).now_ns() < 101e9
    later = Clock.resumed(zero, int(500e9))
    assert 500e9 <= later.now_ns() < 501e9, "the wall clock was set back in between"
    assert later.zero == zero
    assert 10 <= Clock.resumed(datetime.now(UTC) + timedelta(days=1), 10).now_ns() < 1e9


def test_a_reader_never_sees_half_a_manifest(tmp_path: Path):
    manifest = create(tmp_path)
    done = threading.Event()
    versions: set[int] = set()

    def keep_reading() -> None:
        while not done.is_set():
            versions.add(len(read(tmp_path).get("filler", "")))

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for size in range(0, 40_000, 1000):
        manifest.record(filler="x" * size)
    done.set()
    reader.join()
    assert versions <= set(range(0, 40_000, 1000))


def test_a_failed_write_leaves_the_last_version_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = create(tmp_path)

    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        manifest.record(counts=1)
    assert read(tmp_path)["status"] == "running"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_names_that_are_not_utf8_can_be_written(tmp_path: Path):
    create(tmp_path, command=[os.fsdecode(b"input=\xff.jsonl"), "é", "日本"])
    assert read(tmp_path)["command"] == ["input=\udcff.jsonl", "é", "日本"]


def test_processor_and_driver_are_read_where_the_kernel_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags: fpu\n")
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12\n"
    (tmp_path / "version").write_text(version)
    monkeypatch.setattr(provenance, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(provenance, "_GPU_DRIVER", tmp_path / "version")
    machine = provenance.machine()
    assert (machine["processor"], machine["gpu_driver"]) == ("AMD EPYC 7B13", "580.95.05")
    monkeypatch.setattr(provenance, "_GPU_DRIVER", tmp_path / "nowhere")
    assert provenance.machine()["gpu_driver"] is None


def test_provenance_names_versions_machine_and_commit():
    assert provenance.versions()["hydra-core"] is not None
    assert provenance.versions()["torch"] is not None
    assert set(provenance.machine()) == {
        "host",
        "platform",
        "python",
        "processor",
        "gpu_driver",
        "cpu_count",
        "memory_bytes",
    }
    commit = provenance.git(CHECKOUT)
    assert commit is None or set(commit) == {"commit", "dirty"}


def test_a_directory_outside_any_checkout_has_no_commit(tmp_path: Path):
    assert provenance.git(tmp_path) is None


@pytest.mark.parametrize(
    "key", ["HF_TOKEN", "model.api_key", "hfToken", "password", "db.client_secret", "AWS_SECRET_ACCESS_KEY"]
)
def test_names_of_secrets_are_recognised(key: str):
    assert smells_of_secret(key)


@pytest.mark.parametrize(
    "key", ["sampling.max_tokens", "sampling.stop_token_ids", "engine.max_num_batched_tokens", "key", "seed"]
)
def test_names_of_settings_are_not_taken_for_secrets(key: str):
    assert not smells_of_secret(key)


@pytest.mark.parametrize(
    ("argument", "masked"),
    [
        ("+hf_token=abc", f"+hf_token={MASK}"),
        ("input=${oc.env:PROMPTS}", f"input={MASK}"),
        ("input=${ oc.env:PROMPTS,fallback}", f"input={MASK}"),
        ("model.path=https://me:s3cret@host/x", f"model.path=https://{MASK}@host/x"),
        ("model.revision=hf_AbCdEfGhIjKlMnOpQrStUv", f"model.revision={MASK}"),
        ("input=value-of-the-token.jsonl", f"input={MASK}.jsonl"),
        ("kv.block_size=16", "kv.block_size=16"),
    ],
)
def test_secrets_on_a_command_line_are_masked(argument: str, masked: str):
    assert Masker({"HF_TOKEN": "value-of-the-token", "MY_KEY": "x"}).argument(argument) == masked


def test_a_value_from_the_environment_is_masked_wherever_it_goes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOVLLM_TEST_VALUE", "swordfish")
    config = tree(
        input="${oc.env:NANOVLLM_TEST_VALUE}",
        indirect="file-${input}",
        nested={"list": ["${..input}", "${input}", 3]},
        broken="${oc.decode:${input}}",
        seed=1,
        max_tokens=7,
        missing="???",
    )
    masked = Masker({}).resolved(config)
    assert "swordfish" not in json.dumps(masked)
    assert (masked["input"], masked["indirect"]) == (MASK, f"file-{MASK}")
    assert (masked["seed"], masked["max_tokens"], masked["missing"]) == (1, 7, "???")


def test_an_interpolation_between_keys_is_resolved():
    assert Masker({}).resolved(tree(a=3, b="${a}"))["b"] == 3


def test_what_was_written_stays_as_it_was_written():
    assert OmegaConf.to_container(Masker({}).unresolved(tree(a=3, b="${a}")), resolve=False)["b"] == "${a}"  # type: ignore[index]
