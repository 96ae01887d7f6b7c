"""The sampler draws from the distribution it should, and what cannot be drawn from fails alone."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.reference import philox_uniform

DRAWS = 1_000_000
VOCAB = 8
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def draw(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """One token of each row of [N, V], row i with the noise of row i."""
    count = len(logits)
    return reference.draw(
        logits,
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
        noise(count),
        filtered=top_k > 0 or top_p < 1 or min_p > 0,
    )


@cache
def noise(count: int) -> Tensor:
    zeros = torch.zeros(count, dtype=torch.int64)
    return philox_uniform(zeros + 11, torch.arange(count), zeros, zeros)


def expected_probabilities(
    logits: Tensor = LOGITS, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The definition, one token at a time, in float64."""
    p = torch.softmax(logits.double() / temperature, 0).tolist()
    ranked = sorted(range(len(p)), key=lambda token: (-p[token], token))
    kept = ranked[:top_k] if top_k else ranked
    mass, total = 0.0, sum(p[token] for token in kept)
    nucleus = []
    for token in kept:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(token)
        mass += p[token]
    survivors = [token for token in nucleus if p[token] >= min_p * p[ranked[0]]]
    out = torch.zeros(len(p), dtype=torch.float64)
    out[survivors] = torch.tensor([p[token] for token in survivors], dtype=torch.float64)
    return out / out.sum()


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Chance of a deviation at least this large; bins expecting fewer than 20 draws are merged."""
    expected = probabilities * counts.sum()
    large = expected >= 20
    observed = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) == 1:
        return 1.0
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


GRID = [
    (t, k, p, m) for t in (0.3, 1.0, 2.0) for k in (0, 5) for p in (0.1, 0.9, 1.0) for m in (0.0, 0.05)
]  # fmt: skip


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), GRID)
def test_a_million_draws_fit_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens = draw(LOGITS.expand(DRAWS, VOCAB), **settings)
    counts = torch.bincount(tokens, minlength=VOCAB)
    probabilities = expected_probabilities(**settings)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p(counts, probabilities) > 1e-6


def test_the_chi_square_sees_a_bias_of_five_percent() -> None:
    tokens = draw(LOGITS.expand(DRAWS, VOCAB), temperature=1.0)
    biased = expected_probabilities(temperature=1.0)
    biased[biased.argmax()] *= 1.05
    assert chi_square_p(torch.bincount(tokens, minlength=VOCAB), biased / biased.sum()) < 1e-12


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}])
def test_greedy_takes_the_lowest_id_among_equals(settings: dict[str, float]) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 5.0, 5.0, 5.0], [0.0, -1.0, 2.0, 2.0]])
    assert draw(logits, **settings).tolist() == [1, 0, 2]


def test_top_p_of_almost_nothing_is_greedy() -> None:
    assert (draw(LOGITS.expand(1000, VOCAB), temperature=1.0, top_p=1e-9) == LOGITS.argmax()).all()


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    rows = LOGITS.expand(10_000, VOCAB)
    assert torch.equal(draw(rows, temperature=1.0, top_k=VOCAB + 1), draw(rows, temperature=1.0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_row_that_is_not_finite_fails_alone(temperature: float, bad: float, filtered: bool) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    top_k = 5 if filtered else 0
    good = draw(logits, temperature=temperature, top_k=top_k)
    logits[2, 6] = bad
    logits[1] = -math.inf
    tokens = draw(logits, temperature=temperature, top_k=top_k)
    assert tokens.tolist() == [good[0], -1, -1, good[3]]


def test_minus_infinity_only_rules_a_token_out() -> None:
    logits = LOGITS.repeat(10_000, 1)
    logits[:, LOGITS.argmax()] = -math.inf
    tokens = draw(logits, temperature=1.0)
    assert (tokens >= 0).all()
    assert (tokens != LOGITS.argmax()).all()


def test_huge_and_tiny_logits_stay_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e-38, 0.0, -1e-38]])
    assert (draw(logits, temperature=1.0) >= 0).all()
    assert draw(logits, temperature=2e-5)[0] == 0


def test_a_mixed_batch_gives_each_row_what_it_gets_alone() -> None:
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0])
    top_k, top_p = torch.tensor([0, 0, 3, 0]), torch.tensor([1.0, 1.0, 1.0, 0.5])
    min_p, uniform = torch.tensor([0.0, 0.1, 0.0, 0.0]), torch.tensor([0.3, 0.9, 0.5, 0.7], dtype=torch.float64)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5))
    settings = (temperature, top_k, top_p, min_p, uniform)
    together = reference.draw(logits, *settings, filtered=True)
    alone = [reference.draw(logits[i : i + 1], *(s[i : i + 1] for s in settings), filtered=i > 0) for i in range(4)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_noise_is_philox() -> None:
    """The known-answer vectors of the Random123 distribution for philox4x32-10: the first word of each."""
    every = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((every,) * 4, (every,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ]
    for (c0, c1, c2, c3), (k0, k1), word in cases:
        seed, row = _signed(k0 | k1 << 32), _signed(c2 | c3 << 32)
        inputs = (torch.tensor([v]) for v in (seed, row, c1, c0))
        assert philox_uniform(*inputs).item() == (word + 0.5) / 2**32


def test_every_part_of_the_key_changes_the_noise() -> None:
    base = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
    seen = {philox_uniform(*base).item()}
    for i in range(4):
        for value in (1, 2, 1000, 2**31, 2**32 + 1) if i < 2 else (1, 2, 1000, 2**31):
            changed = [*base]
            changed[i] = torch.tensor([value])
            seen.add(philox_uniform(*changed).item())
    assert len(seen) == 1 + 5 + 5 + 4 + 4


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
