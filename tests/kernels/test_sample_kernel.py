"""The sampling kernel draws what the reference draws from the same noise."""

import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.draws import Draws
from kernels.sample import pick_tokens, reduce_blocks, sample
from tests.kernels.test_sample import chi_square_p, expected_probabilities

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QWEN3 = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
BIG_VOCAB = 151_936
BIG_SETTINGS = [{"temperature": 1.0}, QWEN3, {"temperature": 1.0, "min_p": 0.01}]

# (temperature, top_k, top_p, min_p)
GREEDY = (0.0, 3, 0.5, 0.1)
CASES = [
    GREEDY,
    (1e-4, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (3.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (3.0, 30, 1.0, 0.0),
    (5.0, 1500, 1.0, 0.0),
    (5.0, 2500, 1.0, 0.0),
    (3.0, 10_000, 1.0, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (0.7, 0, 0.5, 0.0),
    (5.0, 0, 0.9, 0.0),
    (1.0, 0, 1 - 1e-7, 0.0),
    (0.7, 0, 1.0, 0.1),
    (3.0, 0, 1.0, 1.0),
    (0.6, 20, 0.95, 0.0),
    (2.0, 30, 0.8, 0.2),
    (5.0, 0, 0.9, 0.5),
]


def make_draws(
    count: int,
    *,
    temperature: float | list[float],
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
) -> Draws:
    """Each row with noise of its own, whose key uses all its bits."""
    generator = torch.Generator().manual_seed(11)

    def column(value: float | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=DEVICE).expand(count).contiguous()

    def key(bits: int) -> Tensor:
        return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (count,), generator=generator)

    return Draws(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seed=key(64).to(DEVICE),
        row=key(64).to(DEVICE),
        sample=key(32).to(DEVICE, torch.int32),
        position=key(32).to(DEVICE, torch.int32),
    )


def mixed_draws(cases: list[tuple[float, int, float, float]]) -> Draws:
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*cases, strict=True))
    return make_draws(len(cases), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def random_logits(count: int, vocab_size: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn((count, vocab_size), generator=generator, device=DEVICE) * 3


def assert_draws_like_the_reference(logits: Tensor, draws: Draws) -> None:
    tokens = sample(logits, draws)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == reference.sample(logits, draws).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (8, torch.float16),
        (37, torch.float32),
        (1600, torch.float16),
        (5000, torch.float32),
        pytest.param(5000, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_a_mixed_batch_is_drawn_like_the_reference(vocab_size: int, dtype: torch.dtype) -> None:
    logits = random_logits(len(CASES), vocab_size).to(dtype)
    assert_draws_like_the_reference(logits, mixed_draws(CASES))


@pytest.mark.parametrize("size", [64, 256, 2048])
def test_blocks_may_have_any_size(size: int) -> None:
    """Tokens are the same with blocks of 1,024; what a filter gathers comes from several blocks at once."""
    logits, draws = random_logits(len(CASES), 5000), mixed_draws(CASES)
    blocks = reduce_blocks(logits, draws, size)
    assert blocks.maxima.shape == blocks.sums.shape == (len(CASES), math.ceil(5000 / size))
    assert pick_tokens(logits, blocks, draws).tolist() == reference.sample(logits, draws).tolist()


def test_a_token_is_found_in_whichever_block_it_is() -> None:
    assert_draws_like_the_reference(random_logits(80, 5000), make_draws(80, temperature=3.0))


@pytest.mark.parametrize("vocab_size", [37, 5000])
def test_equal_logits_are_kept_by_rising_id(vocab_size: int) -> None:
    logits = (random_logits(len(CASES), vocab_size) / 4).round()  # the 0 of either sign among them
    assert_draws_like_the_reference(logits.half(), mixed_draws(CASES))


@pytest.mark.parametrize("vocab_size", [37, 2500])
@pytest.mark.parametrize("value", [0.0, -1000.0])
def test_all_logits_but_one_may_be_equal(vocab_size: int, value: float) -> None:
    cases = [(1.0, 7, 1.0, 0.0), (1.0, vocab_size - 1, 0.5, 0.0), (1.0, 0, 0.3, 0.0), (1.0, 0, 1.0, 1.0), GREEDY]
    logits = torch.full((2 * len(cases), vocab_size), value, device=DEVICE)
    logits[len(cases) :, vocab_size // 2] += 1
    assert_draws_like_the_reference(logits.half(), mixed_draws(cases + cases))


def test_settings_may_be_views_of_one_matrix() -> None:
    own = mixed_draws(CASES[-6:])
    matrix = torch.zeros((6, 10), dtype=torch.int32, device=DEVICE)
    wide, real = matrix.view(torch.int64), matrix.view(torch.float32)
    views = Draws(real[:, 6], matrix[:, 5], real[:, 7], real[:, 8], wide[:, 0], wide[:, 1], matrix[:, 4], own.position)
    for view, values in zip(views[:7], own[:7], strict=True):
        view.copy_(values)
    logits = random_logits(6, 50)
    assert sample(logits, views).tolist() == sample(logits, own).tolist()


def test_settings_by_slot_and_the_tokens_that_slots_keep() -> None:
    own = make_draws(4, temperature=[0.0, 1.0, 0.5, 2.0], top_k=[0, 5, 0, 3])
    slot = torch.tensor([5, 0, 3, 6], device=DEVICE)
    by_slot = [torch.zeros(7, dtype=values.dtype, device=DEVICE).index_copy_(0, slot, values) for values in own[:7]]
    logits = random_logits(4, 1100)
    logits[2] = -math.inf
    kept = torch.full((7,), 9, dtype=torch.int32, device=DEVICE)
    tokens = sample(logits, Draws(*by_slot, position=own.position, slot=slot), kept).tolist()
    assert tokens == sample(logits, own).tolist()
    assert kept.tolist() == [tokens[1], 9, 9, 0, 9, tokens[0], tokens[3]]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}, QWEN3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(settings: dict[str, float], bad: float) -> None:
    logits = random_logits(4, 1100)
    draws = make_draws(4, **settings)
    good = sample(logits, draws).tolist()
    logits[2, 1060] = bad
    logits[1] = -math.inf
    assert sample(logits, draws).tolist() == [good[0], -1, -1, good[3]]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}, QWEN3])
def test_minus_infinity_only_rules_a_token_out(settings: dict[str, float]) -> None:
    logits = random_logits(6, 2100)
    logits[:, :1024] = -math.inf
    logits[3:] = -math.inf
    logits[3:, 2050:2053] = 1
    draws = make_draws(6, **settings)
    assert_draws_like_the_reference(logits, draws)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_huge_and_tiny_logits_stay_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e-38, 0.0, -1e-38], [-3e38, -3e38, -3e38]], device=DEVICE)
    cases = [(1.0, 0, 1.0, 0.0), (2e-5, 2, 0.9, 0.0), (100.0, 0, 0.9, 0.1)]
    for case in cases:
        assert_draws_like_the_reference(logits, mixed_draws([case] * 3))


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty((0, 8), device=DEVICE), make_draws(0, temperature=1.0)).tolist() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.5},
        {"temperature": 1.5, "min_p": 0.2},
        pytest.param({"temperature": 1.5, "top_k": 6, "top_p": 0.9}, marks=pytest.mark.gpu),
    ],
)
def test_draws_fit_the_distribution(settings: dict[str, float]) -> None:
    count = 1_000_000 if DEVICE == "cuda" else 100
    logits = random_logits(1, 8, seed=3)
    tokens = sample(logits.expand(count, 8), make_draws(count, **settings)).cpu()
    counts = torch.bincount(tokens, minlength=8)
    probabilities = expected_probabilities(logits[0].cpu(), **settings)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p(counts, probabilities) > 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("settings", BIG_SETTINGS)
def test_five_million_draws_fit_the_distribution(settings: dict[str, float]) -> None:
    logits = random_logits(1, BIG_VOCAB, seed=3).bfloat16()
    counts = torch.zeros(BIG_VOCAB, dtype=torch.int64)
    for first in range(0, 5_000_000, 20_000):
        draws = make_draws(20_000, **settings)
        draws = draws._replace(row=torch.arange(first, first + 20_000, device=DEVICE))
        counts += torch.bincount(sample(logits.expand(20_000, -1), draws), minlength=BIG_VOCAB).cpu()
    probabilities = expected_probabilities(logits[0].cpu(), **settings)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p(counts, probabilities) > 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [*BIG_SETTINGS, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 2.0, "top_k": 500}]
)
def test_a_big_vocabulary_differs_from_the_reference_by_rounding_alone(settings: dict[str, float]) -> None:
    """The uniform number may fall between the two sums of float32 weights: an emulation had it in 0.05 % of rows."""
    count, chunk = 8192, 256
    logits = random_logits(count, BIG_VOCAB).bfloat16()
    draws = make_draws(count, **settings)
    tokens = sample(logits, draws).long()
    parts = [slice(i, i + chunk) for i in range(0, count, chunk)]
    expected = torch.cat([reference.sample(logits[part], Draws(*(d[part] for d in draws[:8]))) for part in parts])
    differing = (tokens != expected).nonzero().flatten()
    assert len(differing) <= count // 1000
    uniform = reference.philox_uniform(draws.seed, draws.row, draws.sample.long(), draws.position.long())
    for row in differing.tolist():
        # 3e-5: a few of the least likely tokens, as many as rounding may add to what top_p keeps.
        cumulated = expected_probabilities(logits[row].cpu(), **settings).cumsum(0)
        token, target = int(tokens[row]), float(uniform[row])
        assert cumulated[max(token - 1, 0)] - 3e-5 <= target <= cumulated[token] + 3e-5


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, *BIG_SETTINGS])
def test_a_row_of_a_big_vocabulary_that_is_not_finite_fails_alone(settings: dict[str, float]) -> None:
    logits = random_logits(64, BIG_VOCAB).bfloat16()
    draws = make_draws(64, **settings)
    good = sample(logits, draws).tolist()
    assert min(good) >= 0
    logits[17, 100_003] = math.nan
    logits[40, BIG_VOCAB - 1] = math.inf
    good[17] = good[40] = -1
    assert sample(logits, draws).tolist() == good


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [8, 1600, 32_001, 262_144])
def test_any_vocabulary_is_drawn_like_the_reference(vocab_size: int) -> None:
    # Flat rows of a large vocabulary may differ by rounding, as above: these are peaked.
    cases = [case for case in CASES if case[0] < 1]
    assert_draws_like_the_reference(random_logits(len(cases), vocab_size).bfloat16(), mixed_draws(cases))


@pytest.mark.gpu
def test_a_captured_launch_draws_from_what_its_inputs_hold_at_replay() -> None:
    logits, draws = random_logits(len(CASES), 5000), mixed_draws(CASES)
    sample(logits, draws)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, draws)
    logits.copy_(random_logits(len(CASES), 5000, seed=9))
    for setting in draws.by_row()[:8]:
        setting.copy_(setting.flip(0))
    graph.replay()
    assert tokens.tolist() == reference.sample(logits, draws).tolist()
