"""Searching a row of logits for the token that is drawn: what sample.py's kernels do their work with."""

import triton
import triton.language as tl


@triton.jit
def gather(
    logits_ptr,
    listed_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    vocab_size,
    num_listed,
    lowest,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """Copy the logits of the listed blocks whose key is at least `lowest`, and their ids, in order; their number.

    Stops once there are more than CAPACITY.
    """
    WIDTH: tl.constexpr = TILE if TILE > BLOCK else BLOCK
    count, start = 0, 0
    x, ids = _listed(logits_ptr, listed_ptr, vocab_size, num_listed, start, BLOCK, WIDTH)
    while (start < num_listed) & (count <= CAPACITY):
        kept = (key_of(x, SPARE_BITS) >= lowest) & (ids < vocab_size)
        # The next blocks are on their way while these are at work.
        start += WIDTH // BLOCK
        next_x, next_ids = _listed(logits_ptr, listed_ptr, vocab_size, num_listed, start, BLOCK, WIDTH)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(candidates_ptr + place, x.to(candidates_ptr.dtype.element_ty), mask=kept & (place < CAPACITY))
        tl.store(candidate_ids_ptr + place, ids, mask=kept & (place < CAPACITY))
        count += tl.sum(kept.to(tl.int32), 0)
        x, ids = next_x, next_ids
    return count


@triton.jit
def _listed(logits_ptr, listed_ptr, vocab_size, num_listed, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The logits of WIDTH / BLOCK listed blocks and their ids, which are `vocab_size` behind the list's end."""
    at = tl.arange(0, WIDTH)
    place = start + at // BLOCK
    is_listed = place < num_listed
    ids = tl.load(listed_ptr + place, mask=is_listed, other=0) * BLOCK + at % BLOCK
    ids = tl.max_contiguous(tl.multiple_of(ids, BLOCK), BLOCK)
    x = tl.load(logits_ptr + ids, mask=is_listed & (ids < vocab_size), other=-float("inf")).to(tl.float32)
    return x, tl.where(is_listed, ids, vocab_size)


@triton.jit
def draw(
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
    key = key_of(x, SPARE_BITS)
    equal = ((key == threshold) & (at < size)).to(tl.int32)
    weights = weight_of(x, largest, scale)
    allowed = (key > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties))
    return tl.where(allowed & (weights >= min_p), weights, 0.0).to(tl.float64), at, tl.sum(equal, 0)


@triton.jit
def kth_largest(x_ptr, size, k, most, lowest, highest, TILE: tl.constexpr, SPARE_BITS: tl.constexpr):
    """The largest key that at least `k` of `size` logits reach, or one on the way there that at most `most` reach.

    At least `k` reach `lowest`; none exceeds `highest`.
    """
    low, high, count = lowest, highest + 1, size
    while (low + 1 < high) & (count > most):
        middle = average(low, high)
        reached = count_from(x_ptr, size, middle, TILE, SPARE_BITS)
        low, high = tl.where(reached >= k, middle, low), tl.where(reached >= k, high, middle)
        count = tl.where(reached >= k, reached, count)
    return low


@triton.jit
def count_from(x_ptr, size, least, TILE: tl.constexpr, SPARE_BITS: tl.constexpr):
    """How many of `size` logits have at least this key."""
    count, start = tl.zeros([TILE], tl.int32), 0
    while start < size:
        x, at = _tile(x_ptr, size, start, TILE)
        count += ((key_of(x, SPARE_BITS) >= least) & (at < size)).to(tl.int32)
        start += TILE
    return tl.sum(count, 0)


@triton.jit
def mass_from(x_ptr, size, least, largest, scale, TILE: tl.constexpr, SPARE_BITS: tl.constexpr):
    """What those of `size` logits that have at least this key weigh together; float64."""
    mass, start = tl.zeros([TILE], tl.float64), 0
    while start < size:
        x, _ = _tile(x_ptr, size, start, TILE)
        mass += tl.where(key_of(x, SPARE_BITS) >= least, weight_of(x, largest, scale), 0.0).to(tl.float64)
        start += TILE
    return tl.sum(mass, 0)


@triton.jit
def _tile(x_ptr, size, start, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    return tl.load(x_ptr + at, mask=at < size, other=-float("inf")).to(tl.float32), at


@triton.jit
def average(low, high):
    """Rounded down, without the overflow of their sum."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def scale_of(temperature):
    """What turns a difference of logits into a power of 2; that of temperature 1 where it is 0."""
    return 1.4426950408889634 / tl.where(temperature == 0, 1.0, tl.maximum(temperature, 1e-30))


@triton.jit
def weight_of(x, largest, scale):
    return tl.exp2((x - largest) * scale)


@triton.jit
def key_of(x, SPARE_BITS: tl.constexpr):
    """int32 in the order of float32 x, the same for 0 and -0, without the bits that its type does not have."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SPARE_BITS


@triton.jit
def value_of(key, SPARE_BITS: tl.constexpr):
    """The float32 with this key, its spare bits 0."""
    bits = tl.where(key < 0, ((key + 1) << SPARE_BITS) - 1, key << SPARE_BITS)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def uniform_of(seed, row, sample_index, position):
    """reference.philox_uniform: float64 in (0, 1)."""
    word, _, _, _ = tl.philox(seed, position, sample_index, row.to(tl.int32), (row >> 32).to(tl.int32))
    return (word.to(tl.float64) + 0.5) / 4294967296.0
