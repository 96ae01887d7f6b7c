"""Sampling by inverse CDF: one pass over the logits, then the one block of ids that holds the token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.draws import Draws
from kernels.launch import dependent_launch, overlap_next, wait_for_previous

_BLOCK = 1024  # ids that share a maximum and a sum
_BLOCKS = 4  # that one program reduces
_TILE = 1024  # values that one step of a search reads
_CAPACITY = 2048  # tokens a filtered row may keep in the running before its searches read all logits
# The low bits of a float32 that tell nothing of a number of this type.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
_ALL = tl.constexpr(2**31 - 1)


def sample(logits: Tensor, draws: Draws, last_tokens: Tensor | None = None) -> Tensor:
    """One token of each row of [N, V] logits; int32 [N], -1 where a row is not finite. See reference.sample.

    `last_tokens`, int32 [slots], gets the tokens by slot.

    Logits are bfloat16, float16 or float32, their rows contiguous. Weights are float32, the sums over blocks float64.
    Two launches whose shape depends on N and V alone: it can be captured in a CUDA graph.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    assert draws.position.is_contiguous()
    settings = draws[:7]
    has_slots = draws.slot is not None
    num_blocks = -(-vocab_size // _BLOCK)

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((num_rows, width), dtype=dtype, device=logits.device)

    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if not num_rows:
        return tokens
    maxima, sums = empty(num_blocks, logits.dtype), empty(num_blocks, torch.float32)
    _reduce_blocks[(num_rows * -(-num_blocks // _BLOCKS),)](
        logits,
        draws.temperature,
        draws.slot,
        maxima,
        sums,
        vocab_size,
        num_blocks,
        logits.stride(0),
        draws.temperature.stride(0),
        HAS_SLOTS=has_slots,
        BLOCK=_BLOCK,
        BLOCKS=_BLOCKS,
        num_warps=4,
        **dependent_launch(logits.device, num_rows),
    )
    _pick_tokens[(num_rows,)](
        logits,
        maxima,
        sums,
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
        HAS_SLOTS=has_slots,
        KEEPS_TOKENS=last_tokens is not None,
        BLOCK=_BLOCK,
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
    scale = _scale(tl.load(temperature_ptr + slot * temperature_stride))
    x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    largest = tl.max(x, 1)
    base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    total = tl.sum(_weight(x, base[:, None], scale), 1)
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
    scale = _scale(temperature)
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
        uniform = _uniform(
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
            lowest, highest = _key(-float("inf"), SPARE_BITS), _key(largest, SPARE_BITS)
            top_k = tl.where(top_k < vocab_size, top_k, 0)
            if top_k == 0:
                # Tokens below this weight have min_p against them, or all together less than 1 - top_p.
                bound = largest + tl.log2(tl.maximum(least, 1e-37)) / scale
                bound -= 0.01 / scale + 1e-6 * tl.abs(largest)
                lowest = tl.minimum(_key(bound, SPARE_BITS), highest)
            elif top_k <= num_blocks:
                # Each of the top_k largest maxima is a token.
                lowest = _key(tl.min(tl.where(live, maxima, largest), 0), SPARE_BITS)
                lowest = _kth_largest(maxima_ptr, num_blocks, top_k, 0, lowest, highest, NUM_BLOCKS, SPARE_BITS)
            elif top_k <= CAPACITY:
                lowest = _kth_largest(logits_ptr, vocab_size, top_k, CAPACITY, lowest, highest, TILE, SPARE_BITS)

            reached = live & (_key(maxima, SPARE_BITS) >= lowest)
            tl.store(listed_ptr + tl.cumsum(reached.to(tl.int32), 0) - 1, block, mask=reached)
            tl.debug_barrier()
            num_candidates = _gather(
                logits_ptr,
                listed_ptr,
                candidates_ptr,
                candidate_ids_ptr,
                vocab_size,
                tl.sum(reached.to(tl.int32), 0),
                lowest,
                BLOCK,
                CAPACITY,
                SPARE_BITS,
            )
            tl.debug_barrier()
            x_ptr, size = logits_ptr, vocab_size
            if num_candidates <= CAPACITY:
                x_ptr, size = candidates_ptr, num_candidates

            threshold, ties = lowest, _ALL
            if top_k > 0:
                threshold = _kth_largest(x_ptr, size, top_k, 0, lowest, highest, TILE, SPARE_BITS)
                ties = top_k - _count(x_ptr, size, threshold + 1, TILE, SPARE_BITS)
                mass = _mass(x_ptr, size, threshold + 1, largest, scale, TILE, SPARE_BITS)
                weight = _weight(_value(threshold, SPARE_BITS), largest, scale)
                mass += ties.to(tl.float64) * weight.to(tl.float64)
            if top_p < 1:
                share = top_p.to(tl.float64) * mass
                low, high = threshold, highest + 1
                while low + 1 < high:
                    middle = _average(low, high)
                    reached_share = _mass(x_ptr, size, middle, largest, scale, TILE, SPARE_BITS) >= share
                    low, high = tl.where(reached_share, middle, low), tl.where(reached_share, high, middle)
                above = _mass(x_ptr, size, low + 1, largest, scale, TILE, SPARE_BITS)
                weight = tl.maximum(_weight(_value(low, SPARE_BITS), largest, scale), 1e-37)
                needed = tl.ceil((share - above) / weight.to(tl.float64))
                needed = tl.minimum(tl.maximum(needed, 1.0), _ALL).to(tl.int32)
                ties = tl.where(low == threshold, tl.minimum(ties, needed), needed)
                threshold = low
            place = _draw(x_ptr, size, threshold, ties, min_p, uniform, largest, scale, TILE, SPARE_BITS)
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
            token = first + _draw(
                logits_ptr + first,
                tl.minimum(vocab_size - first, BLOCK),
                _key(tl.where(greedy, largest, -float("inf")), SPARE_BITS),
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


@triton.jit
def _gather(
    logits_ptr,
    listed_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    vocab_size,
    num_listed,
    lowest,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """Copy the logits of the listed blocks whose key is at least `lowest`, and their ids, in order; their number.

    Stops once there are more than CAPACITY.
    """
    count, i = 0, 0
    first = tl.load(listed_ptr) * BLOCK
    x, at = _tile(logits_ptr + first, vocab_size - first, 0, BLOCK)
    while (i < num_listed) & (count <= CAPACITY):
        kept = (_key(x, SPARE_BITS) >= lowest) & (first + at < vocab_size)
        ids = first + at
        # The next block is on its way while this one is at work.
        i += 1
        first = tl.load(listed_ptr + tl.minimum(i, num_listed - 1)) * BLOCK
        next_x, at = _tile(logits_ptr + first, vocab_size - first, 0, BLOCK)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(candidates_ptr + place, x.to(candidates_ptr.dtype.element_ty), mask=kept & (place < CAPACITY))
        tl.store(candidate_ids_ptr + place, ids, mask=kept & (place < CAPACITY))
        count += tl.sum(kept.to(tl.int32), 0)
        x = next_x
    return count


@triton.jit
def _draw(
    x_ptr,
    size,
    threshold,
    ties,
    min_p,
    uniform,
    largest,
    scale,
    TILE: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """The first of `size` logits at which the cumulated weight of those allowed exceeds this share of their total.

    Allowed are keys above `threshold` and the first `ties` that equal it, if they weigh at least `min_p`.
    """
    total = tl.full((), 0.0, tl.float64)
    num_equal, start = 0, 0
    while start < size:
        weights, at, equal = _allowed(
            x_ptr, size, start, threshold, ties - num_equal, min_p, largest, scale, TILE, SPARE_BITS
        )
        total += tl.sum(weights, 0)
        num_equal += equal
        start += TILE
    target = uniform * total
    # Rounding may leave the target at the total, or lift the sum at a token of no weight: neither is drawn.
    found, last = size, 0
    before = tl.full((), 0.0, tl.float64)
    num_equal, start = 0, 0
    while start < size:
        weights, at, equal = _allowed(
            x_ptr, size, start, threshold, ties - num_equal, min_p, largest, scale, TILE, SPARE_BITS
        )
        cumulated = before + tl.cumsum(weights, 0)
        found = tl.minimum(found, tl.min(tl.where((weights > 0) & (cumulated > target), at, size), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, at, 0), 0))
        before += tl.sum(weights, 0)
        num_equal += equal
        start += TILE
    return tl.where(found < size, found, last)


@triton.jit
def _allowed(
    x_ptr,
    size,
    start,
    threshold,
    ties,
    min_p,
    largest,
    scale,
    TILE: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """float64 weights of a tile, 0 where not allowed; where they stand; how many equal the threshold."""
    x, at = _tile(x_ptr, size, start, TILE)
    key = _key(x, SPARE_BITS)
    equal = ((key == threshold) & (at < size)).to(tl.int32)
    weights = _weight(x, largest, scale)
    allowed = (key > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties))
    return tl.where(allowed & (weights >= min_p), weights, 0.0).to(tl.float64), at, tl.sum(equal, 0)


@triton.jit
def _kth_largest(x_ptr, size, k, most, lowest, highest, TILE: tl.constexpr, SPARE_BITS: tl.constexpr):
    """The largest key that at least `k` of `size` logits reach, or one on the way there that at most `most` reach.

    At least `k` reach `lowest`; none exceeds `highest`.
    """
    low, high, count = lowest, highest + 1, size
    while (low + 1 < high) & (count > most):
        middle = _average(low, high)
        reached = _count(x_ptr, size, middle, TILE, SPARE_BITS)
        low, high = tl.where(reached >= k, middle, low), tl.where(reached >= k, high, middle)
        count = tl.where(reached >= k, reached, count)
    return low


@triton.jit
def _count(x_ptr, size, least, TILE: tl.constexpr, SPARE_BITS: tl.constexpr):
    """How many of `size` logits have at least this key."""
    count, start = tl.zeros([TILE], tl.int32), 0
    while start < size:
        x, at = _tile(x_ptr, size, start, TILE)
        count += ((_key(x, SPARE_BITS) >= least) & (at < size)).to(tl.int32)
        start += TILE
    return tl.sum(count, 0)


@triton.jit
def _mass(x_ptr, size, least, largest, scale, TILE: tl.constexpr, SPARE_BITS: tl.constexpr):
    """What those of `size` logits that have at least this key weigh together; float64."""
    mass, start = tl.zeros([TILE], tl.float64), 0
    while start < size:
        x, _ = _tile(x_ptr, size, start, TILE)
        mass += tl.where(_key(x, SPARE_BITS) >= least, _weight(x, largest, scale), 0.0).to(tl.float64)
        start += TILE
    return tl.sum(mass, 0)


@triton.jit
def _tile(x_ptr, size, start, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    return tl.load(x_ptr + at, mask=at < size, other=-float("inf")).to(tl.float32), at


@triton.jit
def _average(low, high):
    """Rounded down, without the overflow of their sum."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _scale(temperature):
    """What turns a difference of logits into a power of 2; that of temperature 1 where it is 0."""
    return 1.4426950408889634 / tl.where(temperature == 0, 1.0, tl.maximum(temperature, 1e-30))


@triton.jit
def _weight(x, largest, scale):
    return tl.exp2((x - largest) * scale)


@triton.jit
def _key(x, SPARE_BITS: tl.constexpr):
    """int32 in the order of float32 x, the same for 0 and -0, without the bits that its type does not have."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SPARE_BITS


@triton.jit
def _value(key, SPARE_BITS: tl.constexpr):
    """The float32 with this key, its spare bits 0."""
    bits = tl.where(key < 0, ((key + 1) << SPARE_BITS) - 1, key << SPARE_BITS)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, row, sample_index, position):
    """reference.philox_uniform: float64 in (0, 1)."""
    word, _, _, _ = tl.philox(seed, position, sample_index, row.to(tl.int32), (row >> 32).to(tl.int32))
    return (word.to(tl.float64) + 0.5) / 4294967296.0
