"""G90, G91: what a hostile model, configuration or input tries, and what listens while a job runs."""

import contextlib
import glob
import json
import os
import pickle
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.generate_job import COMMAND
from jobs.launch import launch
from jobs.run_dir import ALLOWED_NAME, file_name
from tests.checkpoints import CHAT_TEMPLATE, qwen3_config, write_checkpoint
from tests.jobs.generate_process import bundled_rows, generate, start, write_rows


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


# Models


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def python_file(model: Path, canary: Path) -> None:
    (model / "modeling_evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")


def in_config(**fields: object):
    def write(model: Path, canary: Path) -> None:
        (model / "config.json").write_text(json.dumps(qwen3_config(**fields)))

    return write


def in_tokenizer_config(**fields: object):
    def write(model: Path, canary: Path) -> None:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def pickled_weights(name: str):
    def write(model: Path, canary: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps(Canary(canary)))

    return write


def pickle_named_safetensors(model: Path, canary: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))


def index_that_leaves_the_directory(model: Path, canary: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS = {
    "a Python file": python_file,
    "auto_map": in_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
    "auto_map into another repository": in_config(auto_map={"AutoConfig": "owner/evil--configuration.Evil"}),
    "an internal attention": in_config(_attn_implementation_internal="owner/evil-kernel"),
    "another internal key": in_config(_anything_internal="owner/evil"),
    "another model_type": in_config(model_type="evil"),
    "a tokenizer's auto_map": in_tokenizer_config(auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}),
    "pytorch_model.bin": pickled_weights("pytorch_model.bin"),
    "consolidated.pth": pickled_weights("consolidated.pth"),
    "weights.pt": pickled_weights("weights.pt"),
    "a pickle named safetensors": pickle_named_safetensors,
    "an index that leaves the directory": index_that_leaves_the_directory,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_is_refused_and_runs_nothing(name: str, empty: Path, capfd: pytest.CaptureFixture[str]):
    model, canary = empty.parent / "model", empty.parent / "canary"
    write_checkpoint(model, tokenizer=True)
    MODELS[name](model, canary)
    assert launch(COMMAND, [f"model.path={model}", "reader.limit=1", "progress=off"]) == 2
    assert str(model) in capfd.readouterr().err
    assert not canary.exists()
    assert list(empty.iterdir()) == []


def test_a_hostile_template_costs_its_rows_and_nothing_else(empty: Path):
    model, canary = empty.parent / "model", empty.parent / "canary"
    trap = f"{{{{ cycler.__init__.__globals__.os.mkdir('{canary}') }}}}"
    write_checkpoint(model, tokenizer=True, chat_template="{% if messages[0].content == 'go' %}" + trap + "{% endif %}")
    rows = [{"messages": [{"role": "user", "content": "go"}]}, {"prompt": "fine"}]
    path = write_rows(empty / "rows.jsonl", rows)
    run = generate(empty / "run", f"input={path}", f"model.path={model}", "sampling.max_tokens=2")
    assert run.code == 3
    assert [(row["row"], row["code"]) for row in run.failures] == [(0, "chat_template")]
    assert "SecurityError" in run.failures[0]["reason"]
    assert not canary.exists()


def test_the_templates_that_rows_bring_are_not_taken(empty: Path):
    rows = [{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "evil"}}]
    model = empty.parent / "model"
    write_checkpoint(model, tokenizer=True, chat_template=CHAT_TEMPLATE)
    run = generate(empty / "run", f"input={write_rows(empty / 'rows.jsonl', rows)}", f"model.path={model}")
    assert [row["code"] for row in run.failures] == ["bad_chat_option"]


# Configurations

OVERRIDES = [
    "+_target_=os.mkdir",
    "+model._target_=os.mkdir",
    "+sampling._target_=os.mkdir",
    "+reader.chat_template_kwargs._target_=os.mkdir",
    "reader.chat_template_kwargs={a: {b: [{_target_: os.mkdir}]}}",
    "writer.keep=[{_target_: os.mkdir}]",
    "hydra.launcher._target_=os.mkdir",
    "+hydra.launcher._target_=os.mkdir",
    "hydra.sweeper._target_=os.mkdir",
    "+hydra.callbacks.evil._target_=os.mkdir",
    "hydra.searchpath=[pkg://evil]",
]


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("flags", [[], ["--cfg", "job"], ["-m"]], ids=lambda flags: " ".join(flags) or "run")
def test_no_override_brings_code(override: str, flags: list[str], empty: Path, capfd: pytest.CaptureFixture[str]):
    assert launch(COMMAND, [override, "reader.limit=1", *flags]) == 2
    assert capfd.readouterr().err.startswith("error: ")
    assert list(empty.iterdir()) == []


FILES = {
    "at the top": "_target_: os.mkdir\npath: CANARY\n",
    "in a group": "model:\n  _target_: os.mkdir\n  path: CANARY\n",
    "in a mapping": "reader:\n  chat_template_kwargs:\n    a:\n      _target_: os.mkdir\n      path: CANARY\n",
    "in a list": "reader:\n  chat_template_kwargs:\n    a:\n    - - _target_: os.mkdir\n        path: CANARY\n",
    "a callback": "hydra:\n  callbacks:\n    evil:\n      _target_: os.mkdir\n      path: CANARY\n",
    "the launcher": "hydra:\n  launcher:\n    _target_: os.mkdir\n",
    "the sweeper": "hydra:\n  sweeper:\n    _target_: os.mkdir\n",
    "the search path": "hydra:\n  searchpath:\n  - file:///tmp\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "flags", [[], ["--cfg", "job"], ["--info"], ["-m"]], ids=lambda flags: " ".join(flags) or "run"
)
def test_no_file_of_a_config_directory_brings_code(name: str, flags: list[str], empty: Path, capfd):
    canary, config_dir = empty.parent / "canary", empty.parent / "conf"
    (config_dir / "experiment").mkdir(parents=True)
    text = FILES[name].replace("CANARY", str(canary))
    (config_dir / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}")
    words = ["--config-dir", str(config_dir), "experiment=evil", "reader.limit=1", *flags]
    assert launch(COMMAND, words) == 2
    assert capfd.readouterr().err.startswith("error: ")
    assert not canary.exists()
    assert list(empty.iterdir()) == []


# Names and modes

NAMES = (
    "../up",
    "/etc/up",
    "a/b",
    "..",
    ".hidden",
    "nul\x00byte",
    "CON",
    "x" * 300,
    "%2e%2e/up",
    "a=b,c",
    "~root",
    "-rf",
)


def test_ids_and_custom_ids_never_become_names(empty: Path):
    rows = [{"id": name, "prompt": "x"} for name in NAMES]
    rows += [{"custom_id": name, "body": {"prompt": "x"}} for name in NAMES]
    path = write_rows(empty.parent / "rows.jsonl", rows)
    before = set(Path("/etc").iterdir()) | set(empty.parent.iterdir())
    run = generate(empty / "run", f"input={path}", "sampling.max_tokens=1")
    assert [row["id"] for row in run.generations] == [*NAMES, *NAMES]
    assert {entry.name for entry in empty.iterdir()} == {"run"}
    assert set(Path("/etc").iterdir()) | set(empty.parent.iterdir()) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_name_made_from_values_stays_in_its_directory(name: str):
    made = file_name(name, "-hash")
    assert ALLOWED_NAME.fullmatch(made)
    assert Path("/runs", made).parent == Path("/runs")


def test_everything_that_a_run_writes_is_its_owners_alone(empty: Path):
    rows = [{"custom_id": "a", "body": {"prompt": "x", "max_tokens": 2}}, {"custom_id": "b", "body": 5}]
    before = os.umask(0)
    try:
        run = generate(empty / "run", f"input={write_rows(empty / 'rows.jsonl', rows)}", "writer.format=openai_batch")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (run.directory, *run.directory.rglob("*"))}
    assert {path.name for path in modes} >= {"generations.jsonl", "batch_errors.jsonl", "progress.json", "run.log"}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


# Listeners


def listening(pids: set[int]) -> set[str]:
    """Addresses (hexadecimal, as the kernel writes them) at which these processes listen for TCP or receive UDP."""
    inodes = set()
    for link in (link for pid in pids for link in glob.glob(f"/proc/{pid}/fd/*")):
        with contextlib.suppress(OSError):  # it has been closed
            inodes.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            is_listening = fields[3] == "0A" or table.startswith("udp")
            if is_listening and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


def is_loopback(address: str) -> bool:
    return (
        address.endswith("7F")
        if len(address) == 8
        else address in ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")
    )


def tree_of(pid: int) -> set[int]:
    """The process and everything below it."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= tree_of(int(child))
    return found


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server


def test_a_listener_would_be_seen(listener: socket.socket):
    """In this process, and in a child."""
    assert {address for address in listening({os.getpid()}) if not is_loopback(address)} == {"00000000"}
    script = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print('up', flush=True); time.sleep(30)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert child.pid in tree_of(os.getpid())
    assert {is_loopback(address) for address in listening({child.pid})} == {True}
    child.kill()
    child.communicate()


def test_nothing_listens_while_a_job_runs(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", bundled_rows(40))
    process = start(tmp_path, f"input={path}", "progress=off", "log_level=WARNING")
    num_samples, most_processes, open_to_others = 0, 0, set()
    while process.poll() is None:
        try:
            pids = tree_of(process.pid)
        except OSError:  # a child that has just ended
            continue
        most_processes = max(most_processes, len(pids))
        open_to_others |= {address for address in listening(pids) if not is_loopback(address)}
        num_samples += 1
        time.sleep(0.05)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert num_samples > 10
    assert most_processes >= 2, "the process that tokenises was there"
    assert open_to_others == set()
