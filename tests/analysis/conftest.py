"""Golden runs, made once: nobody may change them."""

from pathlib import Path

import pytest

from tests.analysis.made_run import Shape, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Look-ahead, padded graphs, prefix hits, evictions, preemptions, prompts in chunks."""
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows step by step, as on a CPU."""
    return make_run(tmp_path_factory.mktemp("made") / "plain", Shape(lookahead=0, graphs=False))


@pytest.fixture(scope="session")
def resumed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed twice, then complete."""
    return make_run(tmp_path_factory.mktemp("made") / "resumed", stops_after=[41, 60])
