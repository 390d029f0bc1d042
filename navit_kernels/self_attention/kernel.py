"""Varlen attention with the QK norms folded in: the maths, and the forward kernels.

Per head, with q̂ = r_q·C q and k̂ = r_k·C k (C the centring of layer_norm, identity otherwise; r as in steps.py):

    n_i  = γq ⊙ q̂_i + βq
    u_i  = softmax_scale · log2(e) · γk ⊙ n_i                 the folded query; βk only shifts a row of scores
    S_ij = u_i · k̂_j          P = exp2(S − m) / l             scores in units of log2
    o_i  = Σ_j P_ij v_j        lse_i = m_i + log2(l_i)

Two ways to k̂: tile kernels normalize a key tile in registers on its way to the matrix unit. Stream kernels keep raw K
there and multiply column j of the scores by r_j: (C u_i)·k_j·r_j = u_i·k̂_j. The r_j of long segments come from one
pass over K (`key_sizes`).

Backward, with Δ_i = rowsum(dO ⊙ O) = rowsum(P ⊙ dP):

    dV = Pᵀ dO      dP = dO Vᵀ      G = P ⊙ (dP − Δ)
    dk̂ = ln 2 · Gᵀ u            dk = r_k·(C dk̂ − k̂·mean(dk̂ ⊙ k̂))
    dt = softmax_scale · G k̂    dγk = Σ_i n_i ⊙ dt_i    dn = γk ⊙ dt    dγq = Σ_i dn_i ⊙ q̂_i    dβq = Σ_i dn_i
    dq̂ = γq ⊙ dn                dq = r_q·(C dq̂ − q̂·mean(dq̂ ⊙ q̂))

With neither norm nor weights u is q itself, so that it is not rounded again, and S takes the factor instead.

A fixed maximum (Cauchy-Schwarz: S_ij ≤ √D·‖u_i‖ =: m_i, as ‖k̂‖ ≤ √D) saves the running one and its rescaling. A tile
takes it when every m_i ≤ FIXED_MAX_LIMIT, so that no P falls under 2^(−2·FIXED_MAX_LIMIT). Without a norm of k there is
no such bound: hopper_forward.py says what its kernel does then; the others keep a running maximum.

After FlashAttention-2 (Dao 2023, arXiv 2307.08691); QK norm as in ViT-22B (Dehghani et al. 2023, arXiv 2302.05442).
T tokens, H heads, D head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import (
    LAYER_NORM,
    NONE,
    cast,
    dot_rows,
    dot_values,
    fold_query,
    load_pairs,
    load_rows,
    load_vector,
    multiply,
    row_dot,
    row_statistics,
    scale_rows,
    store_pairs,
    store_rows,
    unit_rows,
    zeros,
)

FIXED_MAX_LIMIT = tl.constexpr(40.0)  # bf16 P ≥ 2⁻⁸⁰, far above its smallest normal 2⁻¹²⁶; so are sums of P·v


@triton.jit
def load_item(items_ptr, item, tokens, tokens_k):
    """(q_start, q_length, k_start, k_length, tile) of a work item; see plan.py."""
    base = items_ptr + item * 8
    q_start, k_start = tl.load(base), tl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = tl.minimum(tl.load(base + 1), tokens - q_start)
    k_length = tl.minimum(tl.load(base + 3), tokens_k - k_start)
    return q_start, q_length, k_start, k_length, tl.load(base + 4)


@triton.jit
def load_weights(
    q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
    Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_WEIGHT: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """(gain, shift) = (γq γk, βq γk) of a head; a stride is 0 where all heads share a vector."""
    k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, D, D1, D2)
    q_weight = load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, D, D1, D2)
    q_bias = load_vector(q_bias_ptr + h * q_bias_stride, Q_BIAS, 0.0, D, D1, D2)
    return multiply(q_weight, k_weight), multiply(q_bias, k_weight)


@triton.jit
def folded_query(
    q, gain, shift, q_eps, fold_scale, Q_NORM: tl.constexpr, CENTRE: tl.constexpr, FOLD: tl.constexpr,
    GAIN: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """(u, mean, r) of raw query rows; u is q itself where nothing is folded in."""
    mean, r = row_statistics(q, q_eps, Q_NORM, D, D1, D2)
    if FOLD:
        q_hat = unit_rows(q, mean, r, Q_NORM, D, D1, D2)
        u = fold_query(q_hat, gain, shift, fold_scale, q[0].dtype, CENTRE, GAIN, SHIFT, D, D1, D2)
    else:
        u = q
    return u, mean, r


@triton.jit
def normalized_keys(k, k_eps, K_NORM: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """(k̂ in k's dtype, r)."""
    mean, r = row_statistics(k, k_eps, K_NORM, D, D1, D2)
    return cast(unit_rows(k, mean, r, K_NORM, D, D1, D2), k[0].dtype), r


@triton.jit
def items_of_class(offsets_ptr, first_item, items, CLASS: tl.constexpr):
    """(first item, count of items) of a class: the launch's own or, where first_item is negative, the device's.

    Decided while the kernel runs: of two kernels that differ in this alone, Triton 3.9 rounds one of them otherwise.
    """
    on_device = first_item < 0
    end = tl.load(offsets_ptr + CLASS + 1, mask=on_device, other=first_item + items)
    first_item = tl.load(offsets_ptr + CLASS, mask=on_device, other=first_item)
    return first_item, end - first_item


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def forward_tile(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item,
    items, tokens, tokens_k, q_stride_t: tl.constexpr, q_stride_h, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_t: tl.constexpr, v_stride_h, q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr,
    k_weight_stride: tl.constexpr, q_eps, k_eps, fold_scale, score_scale, UNIT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_WEIGHT: tl.constexpr, FOLD: tl.constexpr, SAVE_LSE: tl.constexpr,
    PRECISION: tl.constexpr, CLASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns one head of a whole segment of at most BLOCK tokens. One step, no loop over keys."""
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H:
        return
    h = (work % H).to(tl.int64)
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, first + work // H, tokens, tokens_k)
    offs = tl.arange(0, BLOCK)
    mask_q = offs < q_length
    mask_k = offs < k_length
    k = load_rows(k_ptr + h * k_stride_h * UNIT, k_start, offs, k_stride_t, mask_k, D, D1, D2)
    q = load_rows(q_ptr + h * q_stride_h * UNIT, q_start, offs, q_stride_t, mask_q, D, D1, D2)
    v = load_rows(v_ptr + h * v_stride_h * UNIT, k_start, offs, v_stride_t, mask_k, D, D1, D2)
    gain, shift = load_weights(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
        Q_WEIGHT, Q_BIAS, K_WEIGHT, D, D1, D2,
    )  # fmt: skip

    k_hat, _ = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
    u, _, _ = folded_query(
        q, gain, shift, q_eps, fold_scale, Q_NORM, False, FOLD, Q_WEIGHT or K_WEIGHT, Q_BIAS, D, D1, D2
    )
    s = dot_rows(u, k_hat, PRECISION)  # [BLOCK, BLOCK]
    if not FOLD:
        s *= score_scale
    s = tl.where(mask_k[None, :], s, -float("inf"))
    m = tl.where(k_length > 0, tl.max(s, 1), 0.0)
    p = tl.exp2(s - m[:, None])
    l = tl.sum(p, 1)
    out = dot_values(p.to(v[0].dtype), v, zeros(BLOCK, D1, D2), PRECISION)
    out = scale_rows(out, tl.where(l == 0, 0.0, 1.0 / l))

    store_rows(out_ptr + h * D, q_start, offs, H * D, mask_q, out, D, D1, D2)
    if SAVE_LSE:
        tl.store(lse_ptr + h * tokens + q_start + offs, m + tl.log2(l), mask=mask_q)


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "slots"])
def key_sizes(
    k_ptr, r_ptr, r_tiles_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, slots,
    k_stride_t: tl.constexpr, k_stride_h, k_eps, UNIT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, K_NORM: tl.constexpr, CLASS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(r_k, mean) of a tile of ROWS keys, float32 (H, T, 2): K is read once here and never again for its norm.

    With TILES also r_k alone, by item of the class: float32 (H, slots, ROWS), every tile's own start aligned.
    """
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H:
        return
    h = (work % H).to(tl.int64)
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, first + work // H, tokens, tokens_k)
    row = tile * ROWS
    offs = tl.arange(0, ROWS)
    mask = row + offs < k_length
    k = load_rows(k_ptr + h * k_stride_h * UNIT, k_start + row, offs, k_stride_t, mask, D, D1, D2)
    mean, r = row_statistics(k, k_eps, K_NORM, D, D1, D2)
    store_pairs(r_ptr + h * tokens_k * 2, k_start + row, offs, r, mean, mask)
    if TILES:
        tl.store(r_tiles_ptr + (h * slots + work // H) * ROWS + offs, r)


@triton.jit
def stream_step(
    acc, l, m, u, k_ptr, v_ptr, r_ptr, first_key, n0, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K_NORM: tl.constexpr, FOLD: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr, FIXED_MAX: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the online softmax's update of (acc, l, m). Only the last tile of a segment is MASKED."""
    offs = tl.arange(0, BLOCK_N)
    mask = n0 + offs < k_length if MASKED else tl.full([BLOCK_N], True, tl.int1)
    k = load_rows(k_ptr, first_key + n0, offs, k_stride_t, mask, D, D1, D2)
    if NORMALIZE_KEYS:
        k, _ = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
    s = dot_rows(u, k, PRECISION)  # [BLOCK_M, BLOCK_N]
    if K_NORM != NONE and not NORMALIZE_KEYS:
        r, _ = load_pairs(r_ptr, first_key + n0, offs, mask, 0.0)
        s *= r[None, :]
    if not FOLD:
        s *= score_scale
    if MASKED:
        s = tl.where(mask[None, :], s, -float("inf"))
    if FIXED_MAX:
        p = tl.exp2(s - m[:, None])
        l += tl.sum(p, 1)
    else:
        m_new = tl.maximum(m, tl.max(s, 1))
        rescale = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * rescale + tl.sum(p, 1)
        acc = scale_rows(acc, rescale)
        m = m_new
    v = load_rows(v_ptr, first_key + n0, offs, v_stride_t, mask, D, D1, D2)
    acc = dot_values(p.to(v[0].dtype), v, acc, PRECISION)
    return acc, l, m


@triton.jit
def stream_keys(
    m, u, k_ptr, v_ptr, r_ptr, first_key, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K_NORM: tl.constexpr, FOLD: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr, FIXED_MAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys of a segment: (acc, l, m)."""
    acc = zeros(BLOCK_M, D1, D2)
    l = tl.zeros([BLOCK_M], tl.float32)
    whole = k_length // BLOCK_N * BLOCK_N
    for n0 in range(0, whole, BLOCK_N):
        acc, l, m = stream_step(
            acc, l, m, u, k_ptr, v_ptr, r_ptr, first_key, n0, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
            D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, FIXED_MAX, False, BLOCK_N, PRECISION,
        )  # fmt: skip
    if whole < k_length:
        acc, l, m = stream_step(
            acc, l, m, u, k_ptr, v_ptr, r_ptr, first_key, whole, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
            D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, FIXED_MAX, True, BLOCK_N, PRECISION,
        )  # fmt: skip
    return acc, l, m


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def forward_stream(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, r_ptr, items_ptr, offsets_ptr,
    first_item, items, tokens, tokens_k, q_stride_t: tl.constexpr, q_stride_h, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_t: tl.constexpr, v_stride_h, q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr,
    k_weight_stride: tl.constexpr, q_eps, k_eps, fold_scale, score_scale, UNIT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_WEIGHT: tl.constexpr, FOLD: tl.constexpr, SAVE_LSE: tl.constexpr,
    PRECISION: tl.constexpr, CLASS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NORMALIZE_KEYS: tl.constexpr, TRY_FIXED_MAX: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M of an item's ROWS query rows, one head; keys stream by in tiles of BLOCK_N."""
    SPLIT: tl.constexpr = ROWS // BLOCK_M
    CENTRE: tl.constexpr = K_NORM == LAYER_NORM and not NORMALIZE_KEYS
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H * SPLIT:
        return
    h = (work % H).to(tl.int64)
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, first + work // (H * SPLIT), tokens, tokens_k)
    row = tile * ROWS + work // H % SPLIT * BLOCK_M
    offs = tl.arange(0, BLOCK_M)
    mask = row + offs < q_length
    k_length = tl.where(row < q_length, k_length, 0)
    q = load_rows(q_ptr + h * q_stride_h * UNIT, q_start + row, offs, q_stride_t, mask, D, D1, D2)
    gain, shift = load_weights(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
        Q_WEIGHT, Q_BIAS, K_WEIGHT, D, D1, D2,
    )  # fmt: skip
    u, _, _ = folded_query(
        q, gain, shift, q_eps, fold_scale, Q_NORM, CENTRE, FOLD, Q_WEIGHT or K_WEIGHT, Q_BIAS, D, D1, D2
    )
    k_base = k_ptr + h * k_stride_h * UNIT
    v_base = v_ptr + h * v_stride_h * UNIT
    r_base = r_ptr + h * tokens_k * 2

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if TRY_FIXED_MAX:
        u_32 = cast(u, tl.float32)
        bound = tl.sqrt(row_dot(u_32, u_32) * D)
        if tl.max(bound, 0) <= FIXED_MAX_LIMIT:
            acc, l, m = stream_keys(
                bound, u, k_base, v_base, r_base, k_start, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
                D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, True, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
        else:
            acc, l, m = stream_keys(
                m, u, k_base, v_base, r_base, k_start, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
                D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, False, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    else:
        acc, l, m = stream_keys(
            m, u, k_base, v_base, r_base, k_start, k_length, k_stride_t, v_stride_t, k_eps, score_scale,
            D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, False, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip

    acc = scale_rows(acc, tl.where(l == 0, 0.0, 1.0 / l))
    store_rows(out_ptr + h * D, q_start + row, offs, H * D, mask, acc, D, D1, D2)
    if SAVE_LSE:
        lse = tl.where(l == 0, -float("inf"), m + tl.log2(l))
        tl.store(lse_ptr + h * tokens + q_start + row + offs, lse, mask=mask)


@triton.jit(do_not_specialize=["segments", "tokens", "tokens_k", "capacity"])
def write_plan(
    cu_seqlens_ptr, cu_seqlens_k_ptr, items_ptr, offsets_ptr, segments, tokens, tokens_k, capacity,
    LIMITS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PackPlan's items and offsets from cu_seqlens. A program writes one class, behind the classes before it."""
    own = tl.program_id(0)
    before = 0
    for s0 in range(0, segments, BLOCK):
        q_start, q_length, k_start, k_length, kind, tiles = plan_segments(
            cu_seqlens_ptr, cu_seqlens_k_ptr, s0 + tl.arange(0, BLOCK), segments, tokens, tokens_k, LIMITS, TILE
        )
        before += tl.sum(tl.where(kind < own, tiles, 0), 0)
    place = before
    for s0 in range(0, segments, BLOCK):
        offs = s0 + tl.arange(0, BLOCK)
        q_start, q_length, k_start, k_length, kind, tiles = plan_segments(
            cu_seqlens_ptr, cu_seqlens_k_ptr, offs, segments, tokens, tokens_k, LIMITS, TILE
        )
        tiles = tl.where(kind == own, tiles, 0)
        first = place + tl.cumsum(tiles, 0) - tiles
        for tile in range(0, tl.max(tiles, 0)):
            base = items_ptr + (first + tile) * 8
            mask = (tile < tiles) & (first + tile < capacity)
            tl.store(base, q_start, mask=mask)
            tl.store(base + 1, q_length, mask=mask)
            tl.store(base + 2, k_start, mask=mask)
            tl.store(base + 3, k_length, mask=mask)
            tl.store(base + 4, tl.zeros_like(offs) + tile, mask=mask)
            tl.store(base + 5, offs, mask=mask)
        place += tl.sum(tiles, 0)
    tl.store(offsets_ptr + own, tl.minimum(before, capacity))
    if own == CLASSES - 1:
        tl.store(offsets_ptr + CLASSES, tl.minimum(place, capacity))


@triton.jit
def plan_segments(
    cu_seqlens_ptr, cu_seqlens_k_ptr, offs, segments, tokens, tokens_k, LIMITS: tl.constexpr, TILE: tl.constexpr
):
    """Start and length on both sides, class and number of items of some segments."""
    mask = offs < segments
    q_start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + offs, mask=mask, other=0), 0), tokens)
    q_end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + offs + 1, mask=mask, other=0), 0), tokens)
    k_start = tl.minimum(tl.maximum(tl.load(cu_seqlens_k_ptr + offs, mask=mask, other=0), 0), tokens_k)
    k_end = tl.minimum(tl.maximum(tl.load(cu_seqlens_k_ptr + offs + 1, mask=mask, other=0), 0), tokens_k)
    q_length = tl.maximum(q_end - q_start, 0)
    k_length = tl.maximum(k_end - k_start, 0)
    longest = tl.maximum(q_length, k_length)
    kind = tl.zeros_like(offs)
    for i in tl.static_range(len(LIMITS)):
        kind += (longest > LIMITS[i]).to(tl.int32)
    tiles = tl.where(kind == len(LIMITS), (longest + TILE - 1) // TILE, (longest > 0).to(tl.int32))
    return q_start, q_length, k_start, k_length, kind, tiles
