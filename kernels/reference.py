"""The definition of every operation in plain torch; also what runs on a CPU.

Shapes: T tokens of all sequences, packed; N rows; Q query heads; K key/value heads; H head size; V vocabulary; B
sequences; W block table width; S block size. KV caches are [blocks, K, S, H]: a head's share of a block is contiguous.

In float32 on a CPU a token's result depends on its own sequence alone, bit for bit, not on what shares its batch. That
rests on three rules. Matrix products see at least 8 rows (below that BLAS switches to other kernels, whose sums run in
another order); the runner pads the packed tokens to a multiple of ROW_MULTIPLE. Attention walks the keys in chunks of
KEY_CHUNK from position 0, whatever the query length, block size or context of the neighbours, and a chunk that a row
cannot see changes none of its bits. Element-wise work comes in whole multiples of the vector width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.draws import Draws

ROW_MULTIPLE = 16
KEY_CHUNK = 64
_QUERY_ROW_MULTIPLE = 8


def embed(ids: Tensor, weight: Tensor, last_tokens: Tensor) -> Tensor:
    """Rows of weight [V, D] for integers ids [T]; an id below 0 stands for last_tokens[-1 - id]."""
    ids = torch.where(ids < 0, last_tokens[(-1 - ids).clamp(min=0)].to(ids.dtype), ids)
    return F.embedding(ids, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[N, in] times the transpose of [out, in]."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)"""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of [N, gate | up]."""
    gate, up = x.chunk(2, -1)
    # F.silu would be one pass, but its scalar and vector code differ in the last bit, and which of them an element
    # meets depends on how the threads divide the tensor.
    wide = gate.to(torch.promote_types(x.dtype, torch.float32))
    return wide.neg().exp_().add_(1).reciprocal_().mul_(wide).to(x.dtype).mul_(up)


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """silu_mul of the product of [N, in] with the transpose of [gate | up, in]."""
    return silu_mul(linear(x, weight))


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm of the product of [N, in] with the transpose of [out, in] and a residual [N, out]."""
    return add_rms_norm(linear(x, weight), residual, norm_weight, eps)


def rotary_table(head_size: int, theta: float, num_positions: int, device: torch.device) -> Tensor:
    """float32 [positions, 2, H / 2]: cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864)."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    angles = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] / theta**exponents
    return torch.stack([angles.cos(), angles.sin()], 1).to(device)


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate [T, heads, H] by the angles of [T, 2, H / 2]; the halves of H are the two coordinates."""
    cos, sin = (part.unsqueeze(1) for part in cos_sin.unbind(1))
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def norm_rotary_store(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    rotary: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Queries [T, Q, H] of `qkv` [T, Q + 2 K, H], normed and rotated; keys, likewise, and values go into the caches.

    `rotary` is rotary_table's; positions and slots are integers [T].
    """
    num_kv_heads = k_cache.shape[1]
    q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    cos_sin = rotary[positions.long()]
    q = apply_rotary(rms_norm(q, q_weight, eps), cos_sin)
    k = apply_rotary(rms_norm(k, k_weight, eps), cos_sin)
    store_kv(k, v, k_cache, v_cache, slots)
    return q


def linear_norm_rotary_store(
    x: Tensor,
    weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    rotary: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """norm_rotary_store of the product of [T, in] with the transpose of the fused projection, [(Q + 2 K) H, in]."""
    qkv = linear(x, weight).unflatten(-1, (-1, k_cache.shape[3]))
    return norm_rotary_store(qkv, q_weight, k_weight, eps, rotary, positions, k_cache, v_cache, slots)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write [T, K, H] into caches [blocks, K, S, H]; slot = block * S + offset, and -1 writes nothing."""
    live = slots >= 0
    kept = slots[live].long()
    block_size = k_cache.shape[2]
    k_cache[kept // block_size, :, kept % block_size] = k[live]
    v_cache[kept // block_size, :, kept % block_size] = v[live]


def paged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """One query a sequence: [B, Q, H] over the first `context_lens` [B] tokens of `block_tables` [B, W]."""
    num_sequences, num_heads, head_size = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    rows = _round_up(group, _QUERY_ROW_MULTIPLE)
    grouped = q.view(num_sequences, num_kv_heads, group, head_size)
    limits = context_lens[:, None].expand(num_sequences, rows)
    out = _attend(F.pad(grouped, (0, 0, 0, rows - group)), limits, k_cache, v_cache, block_tables, scale)
    return out[:, :, :group].reshape(q.shape)


def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
) -> Tensor:
    """Causal attention of packed queries [T, Q, H], the last `query_lens[b]` of `context_lens[b]` tokens each."""
    out = torch.empty_like(q)
    num_kv_heads, block_size, head_size = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    first = 0
    for b, (num_queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        queries = q[first : first + num_queries].view(num_queries, num_kv_heads, group, head_size)
        grouped = queries.transpose(0, 1).reshape(1, num_kv_heads, num_queries * group, head_size)
        rows = _round_up(num_queries * group, _QUERY_ROW_MULTIPLE)
        limits = torch.arange(context - num_queries + 1, context + 1, device=q.device).repeat_interleave(group)
        limits = F.pad(limits, (0, rows - len(limits)), value=1)[None]
        padded = F.pad(grouped, (0, 0, 0, rows - num_queries * group))
        table = block_tables[b : b + 1, : -(-context // block_size)]
        attended = _attend(padded, limits, k_cache, v_cache, table, scale)[0, :, : num_queries * group]
        per_query = attended.view(num_kv_heads, num_queries, group, head_size).transpose(0, 1)
        out[first : first + num_queries] = per_query.reshape(num_queries, -1, head_size)
        first += num_queries
    return out


def _attend(q: Tensor, limits: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, scale: float) -> Tensor:
    """[B, K, R, H] queries, of which row r of sequence b sees its first limits[b, r] >= 1 keys.

    Online softmax over the key chunks (Milakov and Gimelshein, arXiv 1805.02867).
    """
    num_sequences, num_kv_heads, num_rows, head_size = q.shape
    block_size = k_cache.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide) * scale
    k_rows, v_rows = k_cache.view(-1, head_size), v_cache.view(-1, head_size)
    heads = torch.arange(num_kv_heads, device=q.device)[None, :, None]
    longest = limits.amax(1)
    best = torch.full((num_sequences, num_kv_heads, num_rows, 1), -torch.inf, dtype=wide, device=q.device)
    total = torch.zeros_like(best)
    out = torch.zeros_like(q)
    width = tables.shape[1]
    for start in range(0, width * block_size, KEY_CHUNK):
        positions = torch.arange(start, start + KEY_CHUNK, device=q.device)
        columns = (positions // block_size).clamp(max=width - 1)
        blocks, offsets = tables[:, columns].long(), (positions % block_size).expand(num_sequences, -1)
        # What stands behind a sequence's last token may be anything, NaN included: read its first token there.
        live = positions < longest[:, None]
        blocks, offsets = torch.where(live, blocks, tables[:, :1].long()), torch.where(live, offsets, 0)
        index = ((blocks[:, None] * num_kv_heads + heads) * block_size + offsets[:, None]).flatten()
        shape = (num_sequences, num_kv_heads, KEY_CHUNK, head_size)
        k = k_rows.index_select(0, index).view(shape).to(wide)
        v = v_rows.index_select(0, index).view(shape).to(wide)
        hidden = positions >= limits[:, :, None]
        scores = (q @ k.transpose(-1, -2)).masked_fill_(hidden[:, None], -torch.inf)
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        weights = (scores - new_best).exp_()
        decay = (best - new_best).exp_()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + weights @ v
        best = new_best
    return (out / total).to(k_cache.dtype)


def linear_sample(x: Tensor, weight: Tensor, draws: Draws, last_tokens: Tensor | None = None) -> Tensor:
    """`sample` of the product of [M, in] with the transpose of [V, in], cut to the N <= M rows that draws has.

    The rows behind are padding, which the product sees as the rules above ask for.
    """
    return sample(linear(x, weight)[: len(draws.position)], draws, last_tokens)


def sample(logits: Tensor, draws: Draws, last_tokens: Tensor | None = None) -> Tensor:
    """One token of each row of [N, V] logits; int64 [N], -1 where a row is not finite.

    Where `last_tokens` (integers [slots]) is given, the row's slot in it is set to the token, or to 0 for a -1.

    Temperature 0 is greedy (the lowest id among equals). Filters apply in this order, each to what the one before
    left: top_k (exactly k tokens, lower ids first among equals; 0 is off), top_p (the fewest likeliest tokens that
    reach this share), min_p (at least this fraction of the likeliest token's probability). The token is the first one,
    by id, at which the cumulated probability exceeds the row's uniform number.

    A row with a NaN, a +inf or nothing above -inf fails; a single -inf only rules that token out.
    """
    temperature, top_k, top_p, min_p, seed, row, sample_index, position, _ = draws.by_row()
    if bool(temperature.any()):
        uniform = philox_uniform(seed, row, sample_index.long(), position.long())
    else:
        uniform = torch.empty(0, dtype=torch.float64, device=logits.device)
    filtered = bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any())
    tokens = draw(logits, temperature, top_k, top_p, min_p, uniform, filtered)
    if last_tokens is not None:
        assert draws.slot is not None
        last_tokens[draws.slot] = tokens.clamp(min=0).to(last_tokens.dtype)
    return tokens


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    filtered: bool,
) -> Tensor:
    """`sample` with the noise given: `uniform` is float64 [N] in (0, 1), unread where every row is greedy.

    `filtered` says whether any row uses a filter.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, greedy_tokens = wide.max(-1)
    bad = ~largest.isfinite()
    greedy = temperature == 0
    if bool(greedy.all()):
        return greedy_tokens.masked_fill_(bad, -1)
    scaled = (wide - largest[:, None]) / torch.where(greedy, 1.0, temperature)[:, None]
    probabilities = scaled.exp_().masked_fill_(bad[:, None], 1)
    if filtered:
        probabilities = _filter(probabilities, top_k, top_p, min_p)
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return torch.where(greedy, greedy_tokens, drawn).masked_fill_(bad, -1)


def _filter(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what the filters rule out; `probabilities` are relative to the likeliest token's 1."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[1], device=ordered.device)
    keep = (ranks < top_k[:, None]) | (top_k[:, None] == 0)
    mass = (ordered * keep).cumsum(-1, dtype=torch.float64)
    before = F.pad(mass[:, :-1], (1, 0))
    keep &= (before < top_p[:, None] * mass[:, -1:]) | (top_p[:, None] >= 1)
    keep &= ordered >= min_p[:, None]
    keep[:, 0] = True  # the likeliest token, even where top_p has rounded to 0
    return torch.zeros_like(probabilities).scatter_(-1, ids, ordered * keep)


_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_uniform(seeds: Tensor, rows: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """float64 [N] in (0, 1), a function of (seed, row, sample, position) alone; all int64 [N].

    The first word of Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with the seed
    as key and (position, sample, row low, row high) as counter.
    """
    words = [positions & _LOW, samples & _LOW, rows & _LOW, (rows >> 32) & _LOW]
    keys = [seeds & _LOW, (seeds >> 32) & _LOW]
    for _ in range(10):
        high0, low0 = _multiply(words[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _PHILOX_MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + weyl) & _LOW for key, weyl in zip(keys, _PHILOX_WEYL, strict=True)]
    return (words[0].double() + 0.5) / 2.0**32


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers held in int64, which wraps as it must."""
    product = word * constant
    return (product >> 32) & _LOW, product & _LOW


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
