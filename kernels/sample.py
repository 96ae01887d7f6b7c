"""Sampling by inverse CDF: one pass over the logits, then the one block of ids that holds the token."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.draws import Draws
from kernels.launch import dependent_launch, overlap_next, wait_for_previous
from kernels.token_search import (
    average,
    count_from,
    draw,
    gather,
    key_of,
    kth_largest,
    mass_from,
    scale_of,
    uniform_of,
    value_of,
    weight_of,
)

_BLOCK = 1024  # ids that share a maximum and a sum
_REDUCED = 4096  # ids that one program reduces
_TILE = 1024  # values that one step of a search reads
_CAPACITY = 2048  # tokens a filtered row may keep in the running before its searches read all logits
# The low bits of a float32 that tell nothing of a number of this type.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
_ALL = tl.constexpr(2**31 - 1)


class Blocks(NamedTuple):
    """What is drawn from first: of every block of `size` ids, a power of two, of N rows of logits."""

    size: int
    maxima: Tensor  # [N, blocks], of the logits' type
    sums: Tensor  # float32 [N, blocks], of exp((x - maximum) / temperature): NaN or +inf where an x is


def sample(logits: Tensor, draws: Draws, last_tokens: Tensor | None = None) -> Tensor:
    """One token of each row of [N, V] logits; int32 [N], -1 where a row is not finite. See reference.sample.

    `last_tokens`, int32 [slots], gets the tokens by slot.

    Logits are bfloat16, float16 or float32, their rows contiguous. Weights are float32, the sums over blocks float64.
    Two launches whose shape depends on N and V alone: it can be captured in a CUDA graph.
    """
    return pick_tokens(logits, reduce_blocks(logits, draws, _BLOCK), draws, last_tokens)


def reduce_blocks(logits: Tensor, draws: Draws, size: int) -> Blocks:
    """Blocks of [N, V] logits, whose rows are contiguous, under the draws' temperatures."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    num_blocks, per_program = triton.cdiv(vocab_size, size), max(_REDUCED // size, 1)
    maxima = torch.empty((num_rows, num_blocks), dtype=logits.dtype, device=logits.device)
    sums = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    if num_rows:
        _reduce_blocks[(num_rows * triton.cdiv(num_blocks, per_program),)](
            logits,
            draws.temperature,
            draws.slot,
            maxima,
            sums,
            vocab_size,
            num_blocks,
            logits.stride(0),
            draws.temperature.stride(0),
            HAS_SLOTS=draws.slot is not None,
            BLOCK=size,
            BLOCKS=per_program,
            num_warps=4,
            **dependent_launch(logits.device, num_rows),
        )
    return Blocks(size, maxima, sums)


def pick_tokens(logits: Tensor, blocks: Blocks, draws: Draws, last_tokens: Tensor | None = None) -> Tensor:
    """What `sample` returns, of logits whose blocks are known."""
    num_rows, vocab_size = logits.shape
    num_blocks = blocks.sums.shape[1]
    assert logits.stride(1) == 1, logits.stride()
    assert blocks.maxima.is_contiguous()
    assert blocks.sums.is_contiguous()
    assert draws.position.is_contiguous()
    settings = draws[:7]

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((num_rows, width), dtype=dtype, device=logits.device)

    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if not num_rows:
        return tokens
    _pick_tokens[(num_rows,)](
        logits,
        blocks.maxima,
        blocks.sums,
        *settings,
        draws.position,
        draws.slot,
        empty(num_blocks, torch.int32),
        empty(_CAPACITY, logits.dtype),
        empty(_CAPACITY, torch.int32),
        tokens,
        last_tokens,
        vocab_size,
        num_blocks,
        logits.stride(0),
        *(setting.stride(0) for setting in settings),
        HAS_SLOTS=draws.slot is not None,
        KEEPS_TOKENS=last_tokens is not None,
        BLOCK=blocks.size,
        NUM_BLOCKS=1 << (num_blocks - 1).bit_length(),
        TILE=_TILE,
        CAPACITY=_CAPACITY,
        SPARE_BITS=_SPARE_BITS[logits.dtype],
        num_warps=8,
        maxnreg=80,  # three programs on a multiprocessor; without it, two
        **dependent_launch(logits.device, num_rows),
    )
    return tokens


# The settings may be views into one matrix, at any offset and stride: neither shall cost a compilation.
_SETTINGS = ["temperature", "top_k", "top_p", "min_p", "seed", "row", "sample", "position"]
_UNSPECIALISED = [f"{name}_{part}" for name in _SETTINGS for part in ("ptr", "stride")]


@triton.jit(do_not_specialize=["temperature_ptr", "temperature_stride"])
def _reduce_blocks(
    logits_ptr,
    temperature_ptr,
    slots_ptr,
    maxima_ptr,
    sums_ptr,
    vocab_size,
    num_blocks,
    logits_stride,
    temperature_stride,
    HAS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each block the maximum, and the sum of exp((x - maximum) / temperature): NaN or +inf where an x is."""
    overlap_next(PDL)
    wait_for_previous(PDL)
    groups = tl.cdiv(num_blocks, BLOCKS)
    row = (tl.program_id(0) // groups).to(tl.int64)
    block = tl.program_id(0) % groups * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row)
    scale = scale_of(tl.load(temperature_ptr + slot * temperature_stride))
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    largest = tl.max(x, 1)
    base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    total = tl.sum(weight_of(x, base[:, None], scale), 1)
    at = row * num_blocks + block
    tl.store(maxima_ptr + at, largest.to(maxima_ptr.dtype.element_ty), mask=block < num_blocks)
    tl.store(sums_ptr + at, total, mask=block < num_blocks)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _pick_tokens(
    logits_ptr,
    maxima_ptr,
    sums_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    row_ptr,
    sample_ptr,
    position_ptr,
    slots_ptr,
    listed_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    tokens_ptr,
    last_tokens_ptr,
    vocab_size,
    num_blocks,
    logits_stride,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    seed_stride,
    row_stride,
    sample_stride,
    HAS_SLOTS: tl.constexpr,
    KEEPS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  # a power of two, at least num_blocks
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPARE_BITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program: of its blocks' maxima and sums, the token.

    Whatever the settings allow is a prefix of the tokens in order of falling logit and rising id: all above a
    threshold, and the first few, by id, that equal it. Greedy is the prefix of one.
    """
    overlap_next(PDL)
    wait_for_previous(PDL)
    n = tl.program_id(0).to(tl.int64)
    logits_ptr += n * logits_stride
    maxima_ptr += n * num_blocks
    slot = n
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + n)
    temperature = tl.load(temperature_ptr + slot * temperature_stride)
    top_k = tl.load(top_k_ptr + slot * top_k_stride)
    top_p = tl.load(top_p_ptr + slot * top_p_stride)
    min_p = tl.load(min_p_ptr + slot * min_p_stride)
    scale = scale_of(temperature)
    block = tl.arange(0, NUM_BLOCKS)
    live = block < num_blocks
    maxima = tl.load(maxima_ptr + block, mask=live, other=-float("inf")).to(tl.float32)
    sums = tl.load(sums_ptr + n * num_blocks + block, mask=live, other=0.0)
    largest = tl.max(maxima, 0)
    finite = (tl.sum(tl.where(sums < float("inf"), 0, 1), 0) == 0) & (largest > -float("inf"))
    token = -1
    if finite:
        base = tl.where(maxima > -float("inf"), maxima, largest)
        weights = sums.to(tl.float64) * tl.exp2(((base - largest) * scale).to(tl.float64))
        uniform = uniform_of(
            tl.load(seed_ptr + slot * seed_stride),
            tl.load(row_ptr + slot * row_stride),
            tl.load(sample_ptr + slot * sample_stride),
            tl.load(position_ptr + n),
        )
        if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
            listed_ptr += n * num_blocks
            candidates_ptr += n * CAPACITY
            candidate_ids_ptr += n * CAPACITY
            mass = tl.sum(weights, 0)
            least = tl.maximum(min_p, (1 - top_p) * (mass / vocab_size).to(tl.float32))
            lowest, highest = key_of(-float("inf"), SPARE_BITS), key_of(largest, SPARE_BITS)
            top_k = tl.where(top_k < vocab_size, top_k, 0)
            if top_k == 0:
                # Tokens below this weight have min_p against them, or all together less than 1 - top_p.
                bound = largest + tl.log2(tl.maximum(least, 1e-37)) / scale
                bound -= 0.01 / scale + 1e-6 * tl.abs(largest)
                lowest = tl.minimum(key_of(bound, SPARE_BITS), highest)
            elif top_k <= num_blocks:
                # Each of the top_k largest maxima is a token.
                lowest = key_of(tl.min(tl.where(live, maxima, largest), 0), SPARE_BITS)
                lowest = kth_largest(maxima_ptr, num_blocks, top_k, 0, lowest, highest, NUM_BLOCKS, SPARE_BITS)
            elif top_k <= CAPACITY:
                lowest = kth_largest(logits_ptr, vocab_size, top_k, CAPACITY, lowest, highest, TILE, SPARE_BITS)

            reached = live & (key_of(maxima, SPARE_BITS) >= lowest)
            tl.store(listed_ptr + tl.cumsum(reached.to(tl.int32), 0) - 1, block, mask=reached)
            tl.debug_barrier()
            num_candidates = gather(
                logits_ptr,
                listed_ptr,
                candidates_ptr,
                candidate_ids_ptr,
                vocab_size,
                tl.sum(reached.to(tl.int32), 0),
                lowest,
                BLOCK,
                TILE,
                CAPACITY,
                SPARE_BITS,
            )
            tl.debug_barrier()
            x_ptr, size = logits_ptr, vocab_size
            if num_candidates <= CAPACITY:
                x_ptr, size = candidates_ptr, num_candidates

            threshold, ties = lowest, _ALL
            if top_k > 0:
                threshold = kth_largest(x_ptr, size, top_k, 0, lowest, highest, TILE, SPARE_BITS)
                ties = top_k - count_from(x_ptr, size, threshold + 1, TILE, SPARE_BITS)
                mass = mass_from(x_ptr, size, threshold + 1, largest, scale, TILE, SPARE_BITS)
                weight = weight_of(value_of(threshold, SPARE_BITS), largest, scale)
                mass += ties.to(tl.float64) * weight.to(tl.float64)
            if top_p < 1:
                share = top_p.to(tl.float64) * mass
                low, high = threshold, highest + 1
                while low + 1 < high:
                    middle = average(low, high)
                    reached_share = mass_from(x_ptr, size, middle, largest, scale, TILE, SPARE_BITS) >= share
                    low, high = tl.where(reached_share, middle, low), tl.where(reached_share, high, middle)
                above = mass_from(x_ptr, size, low + 1, largest, scale, TILE, SPARE_BITS)
                weight = tl.maximum(weight_of(value_of(low, SPARE_BITS), largest, scale), 1e-37)
                needed = tl.ceil((share - above) / weight.to(tl.float64))
                needed = tl.minimum(tl.maximum(needed, 1.0), _ALL).to(tl.int32)
                ties = tl.where(low == threshold, tl.minimum(ties, needed), needed)
                threshold = low
            place = draw(x_ptr, size, threshold, ties, min_p, uniform, largest, scale, TILE, SPARE_BITS)
            token = place
            if num_candidates <= CAPACITY:
                token = tl.load(candidate_ids_ptr + place)
        else:
            greedy = temperature == 0
            cumulated = tl.cumsum(weights, 0)
            target = uniform * tl.max(cumulated, 0)
            hit = tl.where(greedy, maxima == largest, (cumulated > target) & (weights > 0))
            chosen = tl.min(tl.where(hit, block, NUM_BLOCKS), 0)
            chosen = tl.where(chosen < NUM_BLOCKS, chosen, tl.max(tl.where(weights > 0, block, 0), 0))
            is_chosen = block == chosen
            past = tl.sum(tl.where(is_chosen, cumulated - target, 0.0), 0)
            share = 1 - past / tl.sum(tl.where(is_chosen, weights, 0.0), 0)
            first = chosen * BLOCK
            token = first + draw(
                logits_ptr + first,
                tl.minimum(vocab_size - first, BLOCK),
                key_of(tl.where(greedy, largest, -float("inf")), SPARE_BITS),
                tl.where(greedy, 1, _ALL),
                0.0,
                share,
                tl.sum(tl.where(is_chosen, base, 0.0), 0),
                scale,
                BLOCK,
                SPARE_BITS,
            )
    tl.store(tokens_ptr + n, token)
    if KEEPS_TOKENS:
        tl.store(last_tokens_ptr + slot, tl.maximum(token, 0))
