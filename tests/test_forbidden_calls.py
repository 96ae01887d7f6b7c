"""G93: no call that could run or unpickle what others have written stands anywhere in the project."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nanovllm", "jobs", "kernels")
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "multiprocessing",
    "pty",
}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system",
    "os.popen",
    "torch.load",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.get_object",
    "OmegaConf.register_new_resolver",
}
METHODS = {"instantiate", "unsafe_load", "full_load", "register_new_resolver"}
KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}
ALLOWED = {
    # A tool that trains the embedded model: a forked pool whose jobs and results are this file's own numbers.
    ("jobs/tiny_rows.py", "import multiprocessing"),
    # ${model_name:CHOICE,PATH} in the patterns of run directories: two texts in, one text out.
    ("jobs/compose.py", "OmegaConf.register_new_resolver()"),
}


def forbidden(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in MODULES or (module, "ProcessPoolExecutor") in {
                (module, alias.name) for alias in node.names
            }:
                yield f"from {module} import"
            yield from (
                f"from {module} import {alias.name}"
                for alias in node.names
                if f"{module}.{alias.name}" in CALLS or alias.name in METHODS
            )
        elif isinstance(node, ast.Call):
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if isinstance(node.func, ast.Name) and name in NAMES:
        yield f"{name}()"
    if name in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        yield f"{name}()"
    for keyword in node.keywords:
        if keyword.arg in KEYWORDS and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is not KEYWORDS[keyword.arg]
        ):
            yield f"{name}({keyword.arg}={ast.unparse(keyword.value)})"


def test_none_of_them_is_there():
    found, num_files = set(), 0
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            num_files += 1
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {(str(path.relative_to(ROOT)), what) for what in forbidden(tree)}
    assert num_files > 100
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, marshal as m",
        "from pickle import loads",
        "from multiprocessing.shared_memory import SharedMemory",
        "from concurrent.futures import ProcessPoolExecutor",
        "from hydra.utils import instantiate",
        "import hydra; hydra.utils.instantiate(config)",
        "eval('1')",
        "exec(code)",
        "compile(code, '', 'exec')",
        "__import__(name)",
        "import os; os.system('ls')",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import yaml; yaml.load(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import subprocess; subprocess.run(text, shell=flag)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "OmegaConf.register_new_resolver('x', f)",
    ],
)
def test_the_gate_sees_each_of_them(code: str):
    assert list(forbidden(ast.parse(code))) != []


@pytest.mark.parametrize(
    "code", ["model.eval()", "re.compile('x')", "np.load(p, allow_pickle=False)", "yaml.safe_load(t)"]
)
def test_the_gate_lets_harmless_calls_pass(code: str):
    assert list(forbidden(ast.parse(code))) == []
