"""What a slot is entered with is what its rows are sampled with."""

import random

import numpy as np
import pytest
import torch

from nanovllm.engine.plan import Admission
from nanovllm.runner.sampling_table import SamplingTable, settings_rows
from nanovllm.sampling_params import GREEDY_TEMPERATURE, MAX_COUNT, MAX_TEMPERATURE, ResolvedSampling

NUM_SLOTS = 13
WIDE = (0, 1, 2**31 - 1, 2**31, 2**32, 2**32 + 7, 2**53 + 1, 2**63 - 1)
"""Around what 32 bits and a float64 hold."""


def random_admission(rng: random.Random, slot: int) -> Admission:
    sampling = ResolvedSampling(
        temperature=rng.choice((0.1, 0.7, 1.0, 1 / 3, MAX_TEMPERATURE, GREEDY_TEMPERATURE, rng.random() + 0.01)),
        top_k=rng.choice((0, 2, 50, 2**24 + 1, MAX_COUNT)),
        top_p=rng.choice((1.0, 0.9, 0.1, 1e-30, 1 - rng.random())),
        min_p=rng.choice((0.0, 0.05, 1.0, rng.random())),
        seed=rng.choice((*WIDE, rng.getrandbits(63))),
    )
    row = rng.choice((*WIDE, rng.getrandbits(63)))
    return Admission(slot=slot, seq_id=0, row=row, sample=rng.choice((0, 1, 2**31 - 1)), sampling=sampling)


def enter(table: SamplingTable, admissions: list[Admission]) -> None:
    slots = torch.tensor([admission.slot for admission in admissions], dtype=torch.int64)
    table.enter(slots, torch.from_numpy(settings_rows(tuple(admissions))))


def read(table: SamplingTable, slots: list[int]) -> list[tuple[float | int, ...]]:
    """(temperature, top_k, top_p, min_p, seed, row, sample) for each of `slots`."""
    positions = torch.arange(len(slots), dtype=torch.int32)
    draws = table.draws(torch.tensor(slots, dtype=torch.int64), positions).by_row()
    assert draws.slot is None
    assert torch.equal(draws.position, positions)
    dtypes = [setting.dtype for setting in draws[:7]]
    assert dtypes == [torch.float32, torch.int32, *[torch.float32] * 2, *[torch.int64] * 2, torch.int32]
    return list(zip(*(setting.tolist() for setting in draws[:7]), strict=True))


def expected(admission: Admission) -> tuple[float | int, ...]:
    """Floats are exactly the nearest float32."""
    sampling = admission.sampling
    temperature, top_p, min_p = (float(np.float32(x)) for x in (sampling.temperature, sampling.top_p, sampling.min_p))
    return temperature, sampling.top_k, top_p, min_p, sampling.seed, admission.row, admission.sample


@pytest.mark.parametrize("seed", range(20))
def test_each_slot_gives_back_what_was_entered_last(seed: int) -> None:
    rng = random.Random(seed)
    table = SamplingTable(NUM_SLOTS, torch.device("cpu"))
    held: dict[int, Admission] = {}
    for _ in range(15):
        slots = rng.sample(range(NUM_SLOTS), rng.randint(0, NUM_SLOTS))
        admissions = [random_admission(rng, slot) for slot in slots]
        enter(table, admissions)
        held |= {admission.slot: admission for admission in admissions}
        asked = rng.choices(sorted(held), k=20) if held else []
        assert read(table, asked) == [expected(held[slot]) for slot in asked]


@pytest.mark.parametrize("wide", WIDE)
def test_seed_and_row_keep_all_their_bits(wide: int) -> None:
    table = SamplingTable(3, torch.device("cpu"))
    enter(table, [Admission(slot=1, seq_id=0, row=wide, sample=0, sampling=ResolvedSampling(seed=2**63 - 1 - wide))])
    assert read(table, [1])[0][4:6] == (2**63 - 1 - wide, wide)


def test_an_empty_slot_is_greedy_and_stays_so_beside_others() -> None:
    table = SamplingTable(NUM_SLOTS, torch.device("cpu"))
    assert {settings[0] for settings in read(table, list(range(NUM_SLOTS)))} == {0.0}
    rng = random.Random(0)
    enter(table, [random_admission(rng, slot) for slot in range(0, NUM_SLOTS, 2)])
    assert {settings[0] for settings in read(table, list(range(1, NUM_SLOTS, 2)))} == {0.0}


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [
        (ResolvedSampling(temperature=0.0), 0.0),
        (ResolvedSampling(temperature=np.nextafter(GREEDY_TEMPERATURE, 0).item()), 0.0),
        (ResolvedSampling(temperature=0.8, top_k=1), 0.0),
        (ResolvedSampling(temperature=GREEDY_TEMPERATURE), np.float32(GREEDY_TEMPERATURE).item()),
        (ResolvedSampling(temperature=0.8, top_k=2), np.float32(0.8).item()),
    ],
)
def test_greedy_settings_have_temperature_zero(sampling: ResolvedSampling, temperature: float) -> None:
    table = SamplingTable(1, torch.device("cpu"))
    enter(table, [Admission(slot=0, seq_id=0, row=0, sample=0, sampling=sampling)])
    assert read(table, [0])[0][0] == temperature


def test_no_admission_is_no_row() -> None:
    table = SamplingTable(2, torch.device("cpu"))
    enter(table, [])
    assert settings_rows(()).shape[0] == 0
    assert read(table, [0, 1]) == [(0.0, 0, 0.0, 0.0, 0, 0, 0)] * 2
