"""Varlen attention, backward: the kernels. The maths stands in kernel.py.

Three ways, by the segment's length. Each gradient element has one writer, so results repeat bit by bit:

- backward_tile: a program owns one head of a whole segment. P is computed anew, Δ = rowsum(P ⊙ dP): reads neither O nor
  lse. Five products.
- backward_resident: the same ownership, but keys stream by while the query rows stay: dk and dv of a key tile are
  complete when it leaves, du stays in registers. Five products.
- backward_prepare, backward_keys, backward_queries for long segments: u into dq's memory and Δ; then programs that own
  keys (dk, dv); then programs that own queries (dq over u). Seven products.

The weights' gradients follow from A = Σ_i dt_i ⊙ q̂_i and B = Σ_i dt_i:
dγq = γk ⊙ A, dβq = γk ⊙ B, dγk = γq ⊙ A + βq ⊙ B. A, and B where there is a βq, are summed by program into `partials`
(N, H, D or 2D), then by sum_partials in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import folded_query, items_of_class, load_item, load_weights, normalized_keys
from .steps import (
    LAYER_NORM,
    NONE,
    cast,
    column_dot,
    column_sum,
    dot_rows,
    dot_values,
    load_pairs,
    load_rows,
    query_gradient,
    row_dot,
    row_statistics,
    scale_all,
    store_pairs,
    store_rows,
    store_vector,
    unit_rows,
    unit_rows_backward,
    zeros,
)


@triton.jit
def store_query_gradient(
    du, q, dq_ptr, partials_ptr, partial, h, first_row, offs, mask, dq_stride_t, mean, r, gain, q_eps, softmax_scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    Q_NORM: tl.constexpr, CENTRE: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, WEIGHT_GRADS: tl.constexpr,
):  # fmt: skip
    """The epilogue of every program that owns query rows."""
    q_hat = unit_rows(q, mean, r, Q_NORM, D, D1, D2)
    dq, dt = query_gradient(du, q_hat, r, gain, q_eps, softmax_scale, Q_NORM, CENTRE, GAIN, D, D1, D2)
    store_rows(dq_ptr, first_row, offs, dq_stride_t, mask, dq, D, D1, D2)
    if WEIGHT_GRADS:
        base = partials_ptr + (partial.to(tl.int64) * H + h) * (D * (1 + SHIFT))
        store_vector(base, column_dot(dt, q_hat), D, D1, D2)
        if SHIFT:
            store_vector(base + D, column_sum(dt), D, D1, D2)


@triton.jit
def store_key_gradient(
    g, k_hat, r, dk_ptr, first_row, offs, mask, dk_stride_t, k_eps, key_factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """dk from Gᵀu: the factor between it and dk̂, and the norm's backward."""
    g = scale_all(g, key_factor)
    dk = unit_rows_backward(g, cast(k_hat, tl.float32), r, k_eps, K_NORM, D, D1, D2)
    store_rows(dk_ptr, first_row, offs, dk_stride_t, mask, dk, D, D1, D2)


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "splits"])
def backward_tile(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr,
    items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, splits, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_t: tl.constexpr, k_stride_h, v_stride_t: tl.constexpr, v_stride_h, dout_stride_t: tl.constexpr,
    dout_stride_h, dq_stride_t: tl.constexpr, dk_stride_t: tl.constexpr, dv_stride_t: tl.constexpr,
    q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr, k_weight_stride: tl.constexpr, q_eps, k_eps, fold_scale,
    score_scale, softmax_scale, key_factor, UNIT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr,
    K_WEIGHT: tl.constexpr, FOLD: tl.constexpr, WEIGHT_GRADS: tl.constexpr, PRECISION: tl.constexpr,
    CLASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H:
        return
    h = (work % H).to(tl.int64)
    item = first + work // H
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, item, tokens, tokens_k)
    offs = tl.arange(0, BLOCK)
    mask_q = offs < q_length
    mask_k = offs < k_length
    q_base = q_ptr + h * q_stride_h * UNIT
    k_base = k_ptr + h * k_stride_h * UNIT
    k = load_rows(k_base, k_start, offs, k_stride_t, mask_k, D, D1, D2)
    q = load_rows(q_base, q_start, offs, q_stride_t, mask_q, D, D1, D2)
    v = load_rows(v_ptr + h * v_stride_h * UNIT, k_start, offs, v_stride_t, mask_k, D, D1, D2)
    dout = load_rows(dout_ptr + h * dout_stride_h * UNIT, q_start, offs, dout_stride_t, mask_q, D, D1, D2)
    gain, shift = load_weights(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
        Q_WEIGHT, Q_BIAS, K_WEIGHT, D, D1, D2,
    )  # fmt: skip

    k_hat, k_r = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
    u, q_mean, q_r = folded_query(
        q, gain, shift, q_eps, fold_scale, Q_NORM, False, FOLD, Q_WEIGHT or K_WEIGHT, Q_BIAS, D, D1, D2
    )
    s = dot_rows(u, k_hat, PRECISION)  # [BLOCK queries, BLOCK keys]
    if not FOLD:
        s *= score_scale
    s = tl.where(mask_k[None, :], s, -float("inf"))
    p = tl.exp2(s - tl.where(k_length > 0, tl.max(s, 1), 0.0)[:, None])
    l = tl.sum(p, 1)
    p = p * tl.where(l == 0, 0.0, 1.0 / l)[:, None]
    dv = dot_values(tl.trans(p.to(dout[0].dtype)), dout, zeros(BLOCK, D1, D2), PRECISION)
    store_rows(dv_ptr + h * D, k_start, offs, dv_stride_t, mask_k, dv, D, D1, D2)

    dp = dot_rows(dout, v, PRECISION)
    g = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(u[0].dtype)
    a = dot_values(tl.trans(g), u, zeros(BLOCK, D1, D2), PRECISION)
    store_key_gradient(
        a, k_hat, k_r, dk_ptr + h * D, k_start, offs, mask_k, dk_stride_t, k_eps, key_factor,
        D, D1, D2, K_NORM,
    )  # fmt: skip
    du = dot_values(g, k_hat, zeros(BLOCK, D1, D2), PRECISION)
    q = load_rows(q_base, q_start, offs, q_stride_t, mask_q, D, D1, D2)  # again: keeping it would cost registers
    store_query_gradient(
        du, q, dq_ptr + h * D, partials_ptr, item * splits, h, q_start, offs, mask_q, dq_stride_t,
        q_mean, q_r, gain, q_eps, softmax_scale, H, D, D1, D2, Q_NORM, False,
            Q_WEIGHT or K_WEIGHT, Q_BIAS, WEIGHT_GRADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "splits"])
def backward_resident(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, partials_ptr, q_weight_ptr, q_bias_ptr,
    k_weight_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, splits, q_stride_t: tl.constexpr,
    q_stride_h, k_stride_t: tl.constexpr, k_stride_h, v_stride_t: tl.constexpr, v_stride_h, dout_stride_t: tl.constexpr,
    dout_stride_h, dq_stride_t: tl.constexpr, dk_stride_t: tl.constexpr, dv_stride_t: tl.constexpr,
    q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr, k_weight_stride: tl.constexpr, q_eps, k_eps, fold_scale,
    score_scale, softmax_scale, key_factor, UNIT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr,
    K_WEIGHT: tl.constexpr, FOLD: tl.constexpr, WEIGHT_GRADS: tl.constexpr, PRECISION: tl.constexpr,
    CLASS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H:
        return
    h = (work % H).to(tl.int64)
    item = first + work // H
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, item, tokens, tokens_k)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < q_length
    q_base = q_ptr + h * q_stride_h * UNIT
    k_base = k_ptr + h * k_stride_h * UNIT
    q = load_rows(q_base, q_start, offs_m, q_stride_t, mask_m, D, D1, D2)
    dout = load_rows(dout_ptr + h * dout_stride_h * UNIT, q_start, offs_m, dout_stride_t, mask_m, D, D1, D2)
    out = load_rows(out_ptr + h * D, q_start, offs_m, H * D, mask_m, D, D1, D2)
    lse = tl.load(lse_ptr + h * tokens + q_start + offs_m, mask=mask_m, other=float("inf"))
    gain, shift = load_weights(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
        Q_WEIGHT, Q_BIAS, K_WEIGHT, D, D1, D2,
    )  # fmt: skip
    delta = row_dot(cast(out, tl.float32), cast(dout, tl.float32))
    u, q_mean, q_r = folded_query(
        q, gain, shift, q_eps, fold_scale, Q_NORM, False, FOLD, Q_WEIGHT or K_WEIGHT, Q_BIAS, D, D1, D2
    )

    du = zeros(BLOCK_M, D1, D2)
    for n0 in range(0, k_length, BLOCK_N):
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = n0 + offs_n < k_length
        first_key = k_start + n0
        k = load_rows(k_base, first_key, offs_n, k_stride_t, mask_n, D, D1, D2)
        v = load_rows(v_ptr + h * v_stride_h * UNIT, first_key, offs_n, v_stride_t, mask_n, D, D1, D2)
        k_hat, k_r = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
        s = dot_rows(u, k_hat, PRECISION)  # [BLOCK_M, BLOCK_N]
        if not FOLD:
            s *= score_scale
        p = tl.where(mask_n[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dv = dot_values(tl.trans(p.to(dout[0].dtype)), dout, zeros(BLOCK_N, D1, D2), PRECISION)
        store_rows(dv_ptr + h * D, first_key, offs_n, dv_stride_t, mask_n, dv, D, D1, D2)
        dp = dot_rows(dout, v, PRECISION)
        g = (p * (dp - delta[:, None])).to(u[0].dtype)
        a = dot_values(tl.trans(g), u, zeros(BLOCK_N, D1, D2), PRECISION)
        store_key_gradient(
            a, k_hat, k_r, dk_ptr + h * D, first_key, offs_n, mask_n, dk_stride_t, k_eps, key_factor,
            D, D1, D2, K_NORM,
        )  # fmt: skip
        du = dot_values(g, k_hat, du, PRECISION)
    q = load_rows(q_base, q_start, offs_m, q_stride_t, mask_m, D, D1, D2)  # again: keeping it would cost registers
    store_query_gradient(
        du, q, dq_ptr + h * D, partials_ptr, item * splits, h, q_start, offs_m, mask_m, dq_stride_t,
        q_mean, q_r, gain, q_eps, softmax_scale, H, D, D1, D2, Q_NORM, False,
            Q_WEIGHT or K_WEIGHT, Q_BIAS, WEIGHT_GRADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def backward_prepare(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, r_ptr, dq_ptr, rows_ptr, sizes_ptr, q_weight_ptr, q_bias_ptr,
    k_weight_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_t: tl.constexpr, k_stride_h, v_stride_t: tl.constexpr, v_stride_h, dout_stride_t: tl.constexpr,
    dout_stride_h, dq_stride_t: tl.constexpr, q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr,
    k_weight_stride: tl.constexpr, q_eps, k_eps, fold_scale, score_scale, UNIT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    CENTRE: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_WEIGHT: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, CLASS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """u into dq's memory, free until backward_queries writes dq there; (lse, Δ) into rows, float32 (H, T, 2).

    PADDED: rows and sizes as hopper_backward.py takes them, item by item, in blocks of PADDED rows; else 0.

    Δ is rowsum(dO ⊙ O), but in float32 rowsum(P ⊙ dP): G subtracts it from the same dP, and where one key has almost
    all of a row's weight only so the two cancel to float32's precision. There lse, a number of the scores' size, is
    too coarse as well: behind the rows stand (log2 of what P sums to with it, 0), for P to take off, too.
    """
    SPLIT: tl.constexpr = ROWS // BLOCK
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H * SPLIT:
        return
    h = (work % H).to(tl.int64)
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, first + work // (H * SPLIT), tokens, tokens_k)
    row = tile * ROWS + work // H % SPLIT * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = row + offs < q_length
    q = load_rows(q_ptr + h * q_stride_h * UNIT, q_start + row, offs, q_stride_t, mask, D, D1, D2)
    out = load_rows(out_ptr + h * D, q_start + row, offs, H * D, mask, D, D1, D2)
    dout = load_rows(dout_ptr + h * dout_stride_h * UNIT, q_start + row, offs, dout_stride_t, mask, D, D1, D2)
    gain, shift = load_weights(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
        Q_WEIGHT, Q_BIAS, K_WEIGHT, D, D1, D2,
    )  # fmt: skip
    u, _, _ = folded_query(
        q, gain, shift, q_eps, fold_scale, Q_NORM, CENTRE, FOLD, Q_WEIGHT or K_WEIGHT, Q_BIAS, D, D1, D2
    )
    store_rows(dq_ptr + h * D, q_start + row, offs, dq_stride_t, mask, u, D, D1, D2)
    rows = tl.cast(tokens, tl.int64)
    head = h * rows
    lse = tl.load(lse_ptr + head + q_start + row + offs, mask=mask, other=0.0)
    if PRECISION == "ieee":
        weight, delta = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for n0 in range(0, k_length, BLOCK):
            mask_n = n0 + offs < k_length
            k = load_rows(k_ptr + h * k_stride_h * UNIT, k_start + n0, offs, k_stride_t, mask_n, D, D1, D2)
            v = load_rows(v_ptr + h * v_stride_h * UNIT, k_start + n0, offs, v_stride_t, mask_n, D, D1, D2)
            k_hat, _ = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
            s = dot_rows(u, k_hat, PRECISION)
            if not FOLD:
                s *= score_scale
            p = tl.where(mask_n[None, :], tl.exp2(s - lse[:, None]), 0.0)
            weight += tl.sum(p, 1)
            delta += tl.sum(p * dot_rows(dout, v, PRECISION), 1)
        delta = tl.where(weight == 0, 0.0, delta / weight)
        rest = tl.where(weight == 0, 0.0, tl.log2(weight))
        store_pairs(rows_ptr + (H * rows + head) * 2, q_start + row, offs, rest, tl.zeros_like(rest), mask)
    else:
        delta = row_dot(cast(out, tl.float32), cast(dout, tl.float32))
    if PADDED:
        part = work // H % SPLIT * BLOCK
        start = (work // (H * SPLIT) * H + h) * ROWS
        numbers = rows_ptr + (start + part // PADDED * PADDED) * 2 + part % PADDED + offs
        tl.store(numbers, tl.where(mask & (k_length > 0), lse, float("inf")))
        tl.store(numbers + PADDED, delta)
        if K_NORM != NONE:
            r, _ = load_pairs(r_ptr + h * tokens_k * 2, k_start + row, offs, row + offs < k_length, 1.0)
            tl.store(sizes_ptr + start + part + offs, r)
    else:
        store_pairs(rows_ptr + head * 2, q_start + row, offs, lse, delta, mask)


@triton.jit
def keys_step(
    dv, a, k, r, v, u_ptr, dout_ptr, rows_ptr, rest_ptr, first_query, m0, q_length, u_stride_t, dout_stride_t,
    score_scale, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FOLD: tl.constexpr, SCALE_ROWS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries passes a tile of keys. Scores stand transposed: r_j lies along rows."""
    offs = tl.arange(0, BLOCK_M)
    mask = m0 + offs < q_length if MASKED else tl.full([BLOCK_M], True, tl.int1)
    u = load_rows(u_ptr, first_query + m0, offs, u_stride_t, mask, D, D1, D2)
    dout = load_rows(dout_ptr, first_query + m0, offs, dout_stride_t, mask, D, D1, D2)
    lse, delta = load_pairs(rows_ptr, first_query + m0, offs, mask, 0.0)
    s = dot_rows(k, u, PRECISION)  # [BLOCK_N, BLOCK_M]
    if SCALE_ROWS:
        s *= r[:, None]
    if not FOLD:
        s *= score_scale
    s -= lse[None, :]
    if PRECISION == "ieee":
        rest, _ = load_pairs(rest_ptr, first_query + m0, offs, mask, 0.0)
        s -= rest[None, :]
    p = tl.exp2(s)
    if MASKED:
        p = tl.where(mask[None, :], p, 0.0)
    dv = dot_values(p.to(dout[0].dtype), dout, dv, PRECISION)
    dp = dot_rows(v, dout, PRECISION)
    g = p * (dp - delta[None, :])
    a = dot_values(g.to(u[0].dtype), u, a, PRECISION)
    return dv, a


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def backward_keys(
    k_ptr, v_ptr, u_ptr, dout_ptr, rows_ptr, r_ptr, dk_ptr, dv_ptr, items_ptr, offsets_ptr, first_item, items, tokens,
    tokens_k, k_stride_t: tl.constexpr, k_stride_h, v_stride_t: tl.constexpr, v_stride_h, u_stride_t: tl.constexpr,
    dout_stride_t: tl.constexpr, dout_stride_h, dk_stride_t: tl.constexpr, dv_stride_t: tl.constexpr, k_eps,
    score_scale, key_factor, UNIT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    K_NORM: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, CLASS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NORMALIZE_KEYS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys of an item's ROWS; queries stream by in tiles of BLOCK_M."""
    SPLIT: tl.constexpr = ROWS // BLOCK_N
    SCALE_ROWS: tl.constexpr = K_NORM != NONE and not NORMALIZE_KEYS
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H * SPLIT:
        return
    h = (work % H).to(tl.int64)
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, first + work // (H * SPLIT), tokens, tokens_k)
    row = tile * ROWS + work // H % SPLIT * BLOCK_N
    offs = tl.arange(0, BLOCK_N)
    mask = row + offs < k_length
    q_length = tl.where(row < k_length, q_length, 0)
    first_key = k_start + row
    k_base = k_ptr + h * k_stride_h * UNIT
    k = load_rows(k_base, first_key, offs, k_stride_t, mask, D, D1, D2)
    v = load_rows(v_ptr + h * v_stride_h * UNIT, first_key, offs, v_stride_t, mask, D, D1, D2)
    if NORMALIZE_KEYS:
        k, _ = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
    if SCALE_ROWS:
        r, _ = load_pairs(r_ptr + h * tokens_k * 2, first_key, offs, mask, 0.0)
    else:
        r = tl.full([BLOCK_N], 1.0, tl.float32)
    u_base = u_ptr + h * D
    dout_base = dout_ptr + h * dout_stride_h * UNIT
    rows_base = rows_ptr + h * tokens * 2
    rest_base = rows_base + tl.cast(tokens, tl.int64) * (H * 2)
    dv = zeros(BLOCK_N, D1, D2)
    a = zeros(BLOCK_N, D1, D2)
    whole = q_length // BLOCK_M * BLOCK_M
    for m0 in range(0, whole, BLOCK_M):
        dv, a = keys_step(
            dv, a, k, r, v, u_base, dout_base, rows_base, rest_base, q_start, m0, q_length, u_stride_t,
            dout_stride_t, score_scale, D, D1, D2, FOLD, SCALE_ROWS, False, BLOCK_M, PRECISION,
        )  # fmt: skip
    if whole < q_length:
        dv, a = keys_step(
            dv, a, k, r, v, u_base, dout_base, rows_base, rest_base, q_start, whole, q_length, u_stride_t,
            dout_stride_t, score_scale, D, D1, D2, FOLD, SCALE_ROWS, True, BLOCK_M, PRECISION,
        )  # fmt: skip
    store_rows(dv_ptr + h * D, first_key, offs, dv_stride_t, mask, dv, D, D1, D2)
    # k is loaded again: keeping it costs registers in the loop
    k = load_rows(k_base, first_key, offs, k_stride_t, mask, D, D1, D2)
    k_mean, k_r = row_statistics(k, k_eps, K_NORM, D, D1, D2)
    k_hat = unit_rows(k, k_mean, k_r, K_NORM, D, D1, D2)
    store_key_gradient(
        a, k_hat, k_r, dk_ptr + h * D, first_key, offs, mask, dk_stride_t, k_eps, key_factor,
        D, D1, D2, K_NORM,
    )  # fmt: skip


@triton.jit
def queries_step(
    du, u, dout, lse, rest, delta, k_ptr, v_ptr, r_ptr, first_key, n0, k_length, k_stride_t, v_stride_t, k_eps,
    score_scale, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K_NORM: tl.constexpr, FOLD: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys passes a tile of queries."""
    offs = tl.arange(0, BLOCK_N)
    mask = n0 + offs < k_length if MASKED else tl.full([BLOCK_N], True, tl.int1)
    k = load_rows(k_ptr, first_key + n0, offs, k_stride_t, mask, D, D1, D2)
    v = load_rows(v_ptr, first_key + n0, offs, v_stride_t, mask, D, D1, D2)
    if NORMALIZE_KEYS:
        k, _ = normalized_keys(k, k_eps, K_NORM, D, D1, D2)
    s = dot_rows(u, k, PRECISION)  # [BLOCK_M, BLOCK_N]
    SCALE_COLUMNS: tl.constexpr = K_NORM != NONE and not NORMALIZE_KEYS
    if SCALE_COLUMNS:
        r, _ = load_pairs(r_ptr, first_key + n0, offs, mask, 0.0)
        s *= r[None, :]
    if not FOLD:
        s *= score_scale
    s -= lse[:, None]
    if PRECISION == "ieee":
        s -= rest[:, None]
    p = tl.exp2(s)
    if MASKED:
        p = tl.where(mask[None, :], p, 0.0)
    dp = dot_rows(dout, v, PRECISION)
    g = p * (dp - delta[:, None])
    if SCALE_COLUMNS:
        g *= r[None, :]
    return dot_values(g.to(k[0].dtype), k, du, PRECISION)


@triton.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "splits"])
def backward_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, rows_ptr, r_ptr, dq_ptr, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr,
    items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, splits, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_t: tl.constexpr, k_stride_h, v_stride_t: tl.constexpr, v_stride_h, dout_stride_t: tl.constexpr,
    dout_stride_h, dq_stride_t: tl.constexpr, q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr,
    k_weight_stride: tl.constexpr, q_eps, k_eps, score_scale, softmax_scale, UNIT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_WEIGHT: tl.constexpr, FOLD: tl.constexpr,
    WEIGHT_GRADS: tl.constexpr, PRECISION: tl.constexpr, CLASS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of an item's ROWS; keys stream by in tiles of BLOCK_N. dq_ptr holds u at first."""
    SPLIT: tl.constexpr = ROWS // BLOCK_M
    CENTRE: tl.constexpr = K_NORM == LAYER_NORM and not NORMALIZE_KEYS
    first, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    work = tl.program_id(0)
    if work >= items * H * SPLIT:
        return
    h = (work % H).to(tl.int64)
    item = first + work // (H * SPLIT)
    part = work // H % SPLIT
    q_start, q_length, k_start, k_length, tile = load_item(items_ptr, item, tokens, tokens_k)
    row = tile * ROWS + part * BLOCK_M
    offs = tl.arange(0, BLOCK_M)
    mask = row + offs < q_length
    k_length = tl.where(row < q_length, k_length, 0)
    first_row = q_start + row
    dq_base = dq_ptr + h * D
    u = load_rows(dq_base, first_row, offs, dq_stride_t, mask, D, D1, D2)
    dout = load_rows(dout_ptr + h * dout_stride_h * UNIT, first_row, offs, dout_stride_t, mask, D, D1, D2)
    rows_base = rows_ptr + h * tokens * 2
    lse, delta = load_pairs(rows_base, first_row, offs, mask, 0.0)
    if PRECISION == "ieee":
        rest, _ = load_pairs(rows_base + tl.cast(tokens, tl.int64) * (H * 2), first_row, offs, mask, 0.0)
    else:
        rest = 0.0
    k_base = k_ptr + h * k_stride_h * UNIT
    v_base = v_ptr + h * v_stride_h * UNIT
    r_base = r_ptr + h * tokens_k * 2
    du = zeros(BLOCK_M, D1, D2)
    whole = k_length // BLOCK_N * BLOCK_N
    for n0 in range(0, whole, BLOCK_N):
        du = queries_step(
            du, u, dout, lse, rest, delta, k_base, v_base, r_base, k_start, n0, k_length, k_stride_t, v_stride_t,
            k_eps, score_scale, D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, False, BLOCK_N, PRECISION,
        )  # fmt: skip
    if whole < k_length:
        du = queries_step(
            du, u, dout, lse, rest, delta, k_base, v_base, r_base, k_start, whole, k_length, k_stride_t, v_stride_t,
            k_eps, score_scale, D, D1, D2, K_NORM, FOLD, NORMALIZE_KEYS, True, BLOCK_N, PRECISION,
        )  # fmt: skip
    gain, shift = load_weights(
        q_weight_ptr, q_bias_ptr, k_weight_ptr, h, q_weight_stride, q_bias_stride, k_weight_stride,
        Q_WEIGHT, Q_BIAS, K_WEIGHT, D, D1, D2,
    )  # fmt: skip
    q = load_rows(q_ptr + h * q_stride_h * UNIT, first_row, offs, q_stride_t, mask, D, D1, D2)
    q_mean, q_r = row_statistics(q, q_eps, Q_NORM, D, D1, D2)
    store_query_gradient(
        du, q, dq_base, partials_ptr, item * splits + part, h, first_row, offs, mask, dq_stride_t,
        q_mean, q_r, gain, q_eps, softmax_scale, H, D, D1, D2, Q_NORM, CENTRE,
        Q_WEIGHT or K_WEIGHT, Q_BIAS, WEIGHT_GRADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def sum_partials(
    partials_ptr, sums_ptr, offsets_ptr, splits, H: tl.constexpr, WIDTH: tl.constexpr,
    CLASSES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sum CHUNK rows of partials (rows, H, WIDTH) in order; rows past the plan's last item don't count."""
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    rows = tl.load(offsets_ptr + CLASSES) * splits
    cols = tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_W], tl.float32)
    for i in range(0, CHUNK, BLOCK):
        offs = chunk * CHUNK + i + tl.arange(0, BLOCK)
        mask = (offs < rows)[:, None] & (cols < WIDTH)[None, :]
        ptrs = partials_ptr + (offs.to(tl.int64) * H + h)[:, None] * WIDTH + cols[None, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
    tl.store(sums_ptr + (chunk.to(tl.int64) * H + h) * WIDTH + cols, total, mask=cols < WIDTH)
