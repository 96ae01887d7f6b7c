"""A simulation that takes steps at once is the one that takes each by itself, to the last block."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from jobs.simulation import simulator
from jobs.simulation.block_ledger import BlockLedger
from jobs.simulation.reading_rows import read_rows
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.settings import Settings
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.running import Running
from nanovllm.events import Recorder
from tests.jobs.synthetic_run import SETTINGS, Row, law, write_run

SMALL = replace(SETTINGS, num_blocks=2000, max_num_seqs=48, max_num_batched_tokens=512)
COSTS = law(
    forward={
        "step": 1.5,
        "rows of logits": 0.01,
        "TFLOP": 1.6,
        "decode context": 1e-4,
        "pairs": 1e-6,
    },
    gap={"step": 0.02},
    submit={"step": 1.2, "row": 0.003, "prefill token": 5e-5},
    postprocess={"step": 0.05, "row": 0.002, "finished row": 0.01},
    between={"step": 0.03, "finished row": 0.05, "new prompt token": 1e-5},
)


def rows(count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    reasons = rng.choice(["length", "stop", "error"], count, p=[0.6, 0.3, 0.1]).tolist()
    lengths = zip(rng.integers(20, 200, count).tolist(), rng.integers(2, 150, count).tolist(), reasons, strict=True)
    return [Row(num_prompt_tokens=i, num_output_tokens=o, finish_reason=reason) for i, o, reason in lengths]


def alike(count: int, num_tokens: int) -> list[Row]:
    """Equal prompts: the blocks of one hold what all the others need."""
    first = Row(num_prompt_tokens=num_tokens, num_output_tokens=80)
    return [replace(first, shared_prefix_row=0, shared_prefix_tokens=num_tokens) if i else first for i in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    rows: list[Row]
    settings: Settings = SMALL
    recorded: Settings | None = None
    """Those of the run that is simulated, where they are others."""
    on_gpu: bool = True
    equal_outputs: bool = False


WORLDS = {
    "rows of all kinds": World(rows=rows(150, 1)),
    "without look-ahead": World(rows=rows(100, 2), on_gpu=False),
    "rows that end sooner than they did, without look-ahead": World(
        rows=[Row(num_prompt_tokens=50, num_output_tokens=150)] * 10,
        settings=replace(SMALL, max_model_len=128),
        recorded=SMALL,
        on_gpu=False,
    ),
    "small blocks": World(rows=rows(60, 3), settings=replace(SMALL, block_size=4, num_blocks=4000)),
    "a tight cache, with preemptions": World(
        rows=rows(100, 4), settings=replace(SMALL, num_blocks=150, max_model_len=512)
    ),
    "no prefix caching": World(rows=rows(80, 5), settings=replace(SMALL, prefix_caching=False)),
    "prompts that are found in the cache while others decode": World(
        rows=[replace(row, num_output_tokens=6 + place // 6 * 6) for place, row in enumerate(alike(33, 158))],
        settings=replace(SMALL, block_size=2, num_blocks=8000, max_num_seqs=128),
        on_gpu=False,
    ),
    "a long queue": World(rows=rows(300, 6), settings=replace(SMALL, max_num_seqs=8)),
    "equal prompts": World(rows=alike(40, 512)),
    "equal prompts and answers": World(rows=alike(40, 64), equal_outputs=True),
    "equal answers, without look-ahead": World(rows=alike(40, 60), equal_outputs=True, on_gpu=False),
}


class Simulated:
    """A world's simulation, and what is left of it."""

    def __init__(self, world: World, directory: Path, *, leaps: bool) -> None:
        run = RecordedRun("run", directory)
        recorded = read_rows(run).rows
        if world.equal_outputs:
            made_up = recorded.output_tokens > 0
            recorded.output_tokens[made_up] = 5
        self.ledger = BlockLedger()
        recorders = [] if leaps else [Recorder()]
        simulation = simulator._Simulation(
            run.facts, recorded, COSTS, world.settings, ledger=self.ledger, recorders=recorders
        )
        simulation.run()
        self.outcome = simulation.outcome
        self.blocks = simulation._engine.scheduler.blocks

    def times(self) -> np.ndarray:
        return np.array([self.outcome.seconds, *self.outcome.latencies_s])

    def counts(self) -> list[object]:
        outcome = self.outcome
        return [
            outcome.num_steps, outcome.num_cached_tokens, outcome.num_output_tokens, outcome.num_preemptions,
            outcome.most_rows, outcome.most_tokens, [numbers(shared) for shared in outcome.shared],
        ]  # fmt: skip

    def events(self) -> dict[str, list[int]]:
        return {name: column.tolist() for name, column in self.ledger.columns().items()}

    def left(self) -> dict[str, list[object]]:
        """What the block manager remembers: every allocation, publication and release has left its mark."""
        blocks = self.blocks
        return {
            "empty": blocks._empty.tolist(),
            "cached": blocks._cached.tolist(),
            "hashes": blocks._hashes.tolist(),
            "contents": blocks._contents.tolist(),
            "tokens": blocks._tokens.tolist(),
            "index": sorted(blocks._index.items()),
        }


def numbers(shared: object) -> tuple[int, ...]:
    return tuple(int(value) for value in shared)  # type: ignore[attr-defined]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each leap, as they are taken."""
    taken: list[int] = []
    leap = LLMEngine.leap

    def counting(engine: LLMEngine, num_steps: int, *words: object) -> object:
        taken.append(num_steps)
        return leap(engine, num_steps, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(LLMEngine, "leap", counting)
    return taken


@pytest.mark.parametrize("name", WORLDS)
def test_steps_that_are_taken_at_once_do_what_they_do_one_by_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = WORLDS[name]
    write_run(tmp_path / "run", world.rows, COSTS, world.recorded or world.settings, on_gpu=world.on_gpu)
    one_by_one = Simulated(world, tmp_path / "run", leaps=False)
    taken = counted(monkeypatch)

    at_once = Simulated(world, tmp_path / "run", leaps=True)

    assert len(taken) >= 5
    assert max(taken) <= world.settings.block_size
    if "preemptions" in name:
        assert at_once.outcome.num_preemptions > 3
    if name == "equal prompts":
        assert any(shared.saved for shared in at_once.outcome.shared)
    assert at_once.counts() == one_by_one.counts()
    assert at_once.left() == one_by_one.left()
    assert at_once.events() == one_by_one.events()
    np.testing.assert_allclose(at_once.times(), one_by_one.times(), rtol=0, atol=2e-9)  # a clock of nanoseconds


def without(passage: str, instead: str) -> Callable[..., None]:
    """`Running.leap` with a bug."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(Running.leap))
    assert source.count(passage) == 1, f"mend the mutant: {passage!r} stands {source.count(passage)} times in leap"
    found: dict[str, Callable[..., None]] = {}
    exec(source.replace(passage, instead), vars(__import__("nanovllm.engine.running", fromlist=["np"])), found)
    return found["leap"]


@pytest.mark.parametrize(
    ("passage", "instead"),
    [
        ("self.grow(slots[need])", "self.grow(slots[np.sort(need)])"),
        ("np.minimum(computed, committed - 1)", "np.minimum(computed, committed)"),
        ('due = due[full_in[due].argsort(kind="stable")]', "pass"),
        ("self.length[slots] += num_steps", "self.length[slots] += num_steps - 1"),
        ("room < num_steps", "room <= num_steps"),
        ("return room, full_in", "return room, full_in + 1"),
        ("return room, full_in", "return room + 1, full_in"),
    ],
)
def test_a_leap_that_does_otherwise_is_noticed(
    passage: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = WORLDS["rows of all kinds"]
    write_run(tmp_path / "run", world.rows, COSTS, world.settings)
    one_by_one = Simulated(world, tmp_path / "run", leaps=False)
    monkeypatch.setattr(Running, "leap", without(passage, instead))
    try:
        at_once = Simulated(world, tmp_path / "run", leaps=True)
    except (AssertionError, IndexError):
        return
    told = [(each.counts(), each.left(), each.events()) for each in (one_by_one, at_once)]
    assert told[0] != told[1]


def test_nothing_is_taken_at_once_where_every_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = WORLDS["without look-ahead"]
    write_run(tmp_path / "run", world.rows, COSTS, world.settings, on_gpu=False)
    taken = counted(monkeypatch)
    Simulated(world, tmp_path / "run", leaps=False)
    assert taken == []
