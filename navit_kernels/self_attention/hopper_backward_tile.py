"""Varlen attention, backward of short segments on Hopper, in Gluon. The maths stands in kernel.py.

A program owns one head of a whole segment, as backward_tile does, in one or two warpgroups. All rows come and go by
TMA, the products are asynchronous, and two programs or more share a multiprocessor: one's products run under another's
softmax. Four tiles of rows hold everything, and each is used again as soon as its rows are done with:

    tile    holds, in this order                       left by
    Q       q, u, dk                                   TMA store of dk
    K       k, k̂, dq                                   TMA store of dq
    V       v, dv                                      TMA store of dv
    dO      dO, q again (from the L2 cache)
    scores  P, G, sums of the warps

    TMA          q, k ──qk_full──┐ v, dO ──vo_full──┐                       q ──q_full──┐
    rows                         u, k̂               │ P          G         │ dv       dk│       dq
    matrix unit                         S = u·k̂ᵀ    dP = dO·vᵀ     dV = Pᵀ·dO   Gᵀ·u, G·k̂

S and dP are computed in steps of 64 rows a warpgroup: dP of a step takes the registers of its S. Barriers: qk_full,
vo_full and q_full, each of one arrival and one phase, say that TMA's rows are there. None says that a tile is free: all
warps that read it also write or load it anew. Rows past the segment's end are loaded as zeros and not stored (see
hopper_steps.py), so that neither neighbours nor what the tiles held before comes in.

P comes from the forward's lse where the forward had the same scores, to the bit (use_lse), else from S alone. Δ is
rowsum(P ⊙ dP): the output is not read.

T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from .._jit import BoundKernel
from .hopper_steps import PART, bind, items_of_class, ragged_parts
from .hopper_tile_steps import (
    add_columns,
    affine_rows,
    column_parts,
    load_block,
    load_vector,
    matrix,
    multiply,
    read,
    row_statistics,
    scale_all,
    scale_columns,
    start_dot_rows,
    start_dot_values,
    store_block,
    store_column_sums,
    unit_rows_backward,
    wait_for,
    widen,
    write,
)
from .steps import NONE


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "splits"])
def hopper_backward_tile(
    q_1, k_1, v_1, dout_1, dq_1, dk_1, dv_1, q_2, k_2, v_2, dout_2, dq_2, dk_2, dv_2, lse_ptr, partials_ptr,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, splits,
    q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale,
    score_scale, softmax_scale, key_factor, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr,
    K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr,
    WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr, BLOCK: gl.constexpr,
    USE_LSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    work = gl.program_id(0)
    first_item, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    if work >= items * H:
        return
    DTYPE: gl.constexpr = q_1.dtype
    PARTS: gl.constexpr = 2 if D2 else 1
    TILE_BYTES: gl.constexpr = BLOCK * (PART + D2) * 2
    ROWS: gl.constexpr = 16 * num_warps
    STEPS: gl.constexpr = BLOCK // ROWS
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    NEEDS_Q: gl.constexpr = Q_NORM != NONE or WEIGHT_GRADS
    q_in, k_in = column_parts(q_1, q_2, D2), column_parts(k_1, k_2, D2)
    v_in, dout_in = column_parts(v_1, v_2, D2), column_parts(dout_1, dout_2, D2)
    dq_out, dk_out, dv_out = column_parts(dq_1, dq_2, D2), column_parts(dk_1, dk_2, D2), column_parts(dv_1, dv_2, D2)
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK, 16])
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D2 or 16, 16])
    layouts: gl.constexpr = (mma_1, mma_2)
    col_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    row_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    zero_s = gl.zeros([ROWS, BLOCK], gl.float32, mma_s)
    zero_1 = gl.zeros([BLOCK, PART], gl.float32, mma_1)
    zero_d = column_parts(zero_1, zero_1 if D2 == 0 else gl.zeros([BLOCK, D2 or 16], gl.float32, mma_2), D2)

    tiles_1 = gl.allocate_shared_memory(DTYPE, [4, 1, 1, 1, BLOCK, PART], q_1.layout)
    if D2 == 0:
        tiles = (tiles_1,)
    else:
        tiles = (tiles_1, gl.allocate_shared_memory(DTYPE, [4, 1, 1, 1, BLOCK, D2], q_2.layout))
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], DTYPE)
    scores = gl.allocate_shared_memory(DTYPE, [BLOCK, BLOCK], SCORES)
    qk_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    vo_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qk_full, count=1)
    mbarrier.init(vo_full, count=1)
    mbarrier.init(q_full, count=1)
    fence_async_shared()

    h = work % H
    item = first_item + work // H
    base = items_ptr + item * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    at_q, at_k, at_v, at_do = 0, 1, 2, 3
    mbarrier.expect(qk_full, 2 * TILE_BYTES)
    load_block(k_in, tiles, at_k, qk_full, k_start, k_length, 0, h)
    load_block(q_in, tiles, at_q, qk_full, q_start, q_length, 0, h)
    mbarrier.expect(vo_full, 2 * TILE_BYTES)
    load_block(v_in, tiles, at_v, vo_full, k_start, k_length, 0, h)
    load_block(dout_in, tiles, at_do, vo_full, q_start, q_length, 0, h)
    q_mem, k_mem = matrix(tiles, at_q, BLOCK, D2), matrix(tiles, at_k, BLOCK, D2)
    v_mem, do_mem = matrix(tiles, at_v, BLOCK, D2), matrix(tiles, at_do, BLOCK, D2)

    if GAIN:
        k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
        gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2), k_weight)
    if Q_BIAS:
        shift = load_vector(q_bias_ptr + h * q_bias_stride, Q_BIAS, 0.0, layouts, D, D2)
        if GAIN:
            shift = multiply(shift, k_weight)
    if USE_LSE:
        lse = ()
        for i in gl.static_range(STEPS):
            rows = i * ROWS + gl.arange(0, ROWS, row_s)
            pointers = lse_ptr + h.to(gl.int64) * tokens + q_start + rows
            lse = lse + (gl.load(pointers, mask=rows < q_length, other=float("inf")),)  # noqa: RUF005

    # ---- u and k̂ in place
    mbarrier.wait(qk_full, 0)
    if K_NORM != NONE:
        k = read(k_mem, layouts)
        k_r, k_offset = row_statistics(k, k_eps, K_NORM, D)
        write(k_mem, affine_rows(k, k_r, k_offset, D))
    else:
        k_r = gl.full([BLOCK], 1.0, gl.float32, gl.SliceLayout(1, mma_1))
    if Q_NORM != NONE:
        q = read(q_mem, layouts)
        q_r, q_offset = row_statistics(q, q_eps, Q_NORM, D)
        u = affine_rows(q, q_r * fold_scale, q_offset * fold_scale, D)
    else:
        q_r = gl.full([BLOCK], 1.0, gl.float32, gl.SliceLayout(1, mma_1))
        q_offset = gl.zeros_like(q_r)
        if FOLD:
            u = scale_all(read(q_mem, layouts), fold_scale)
    if FOLD:
        if GAIN:
            u = scale_columns(u, gain)
        if Q_BIAS:
            u = add_columns(u, scale_all(shift, fold_scale))
        write(q_mem, u)
    fence_async_shared()

    # ---- P, then dP as room comes free
    s = ()
    for i in gl.static_range(STEPS):
        s = s + (start_dot_rows(q_mem, k_mem, zero_s, i * ROWS, ROWS),)  # noqa: RUF005
    mbarrier.wait(vo_full, 0)
    dp = ()
    for i in gl.static_range(STEPS):
        s_i = warpgroup_mma_wait((STEPS - 1) * PARTS, deps=[s[i]])
        if not FOLD:
            s_i = s_i * score_scale
        if USE_LSE:
            p = gl.exp2(s_i - lse[i][:, None])
            if k_length < BLOCK:
                p = gl.where((gl.arange(0, BLOCK, col_s) < k_length)[None, :], p, 0.0)
        else:
            if k_length < BLOCK:
                s_i = gl.where((gl.arange(0, BLOCK, col_s) < k_length)[None, :], s_i, -float("inf"))
            m = gl.where(k_length > 0, gl.max(s_i, 1), 0.0)
            p = gl.exp2(s_i - m[:, None])
            l = gl.sum(p, 1)
            p = p * gl.where(l == 0, 0.0, 1.0 / l)[:, None]
        scores.slice(i * ROWS, ROWS).store(p.to(DTYPE))
        dp = dp + (start_dot_rows(do_mem, v_mem, zero_s, i * ROWS, ROWS),)  # noqa: RUF005
    fence_async_shared()

    # ---- G and dV
    g = ()
    for i in gl.static_range(STEPS):
        dp_i = warpgroup_mma_wait((STEPS - 1 - i) * PARTS, deps=[dp[i]])
        p = widen(scores.slice(i * ROWS, ROWS).load(mma_s))
        g = g + ((p * (dp_i - gl.sum(p * dp_i, 1)[:, None])).to(DTYPE),)  # noqa: RUF005
    dv = start_dot_values(scores.permute([1, 0]), do_mem, zero_d)
    # G is a dep of the wait, and a wait for what has long come stands before it: the compiler moves G over neither
    mbarrier.wait(vo_full, 0)
    if D2 == 0:
        dv_1, g_last = warpgroup_mma_wait(0, deps=[dv[0], g[STEPS - 1]])
        dv = (dv_1,)
    else:
        dv_1, dv_2, g_last = warpgroup_mma_wait(0, deps=[dv[0], dv[1], g[STEPS - 1]])
        dv = (dv_1, dv_2)
    for i in gl.static_range(STEPS):
        scores.slice(i * ROWS, ROWS).store(g_last if i == STEPS - 1 else g[i])
    fence_async_shared()

    # ---- a = Gᵀu and du; meanwhile dv leaves by v's tile, and q comes again into dout's
    a = start_dot_values(scores.permute([1, 0]), q_mem, zero_d)
    du = start_dot_values(scores, k_mem, zero_d)
    if NEEDS_Q:
        mbarrier.expect(q_full, TILE_BYTES)
        load_block(q_in, tiles, at_do, q_full, q_start, q_length, 0, h)
    write(v_mem, dv)
    store_block(dv_out, tiles, at_v, k_start, k_length, 0, h)

    if GAIN:  # loaded again: keeping it would cost registers
        k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
        gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2), k_weight)

    # ---- dk leaves by u's tile
    a = wait_for(a, PARTS)
    k_hat = read(k_mem, layouts)
    write(q_mem, unit_rows_backward(a, k_hat, k_r, key_factor, k_eps, K_NORM, D))
    store_block(dk_out, tiles, at_q, k_start, k_length, 0, h)

    # ---- dq leaves by k̂'s tile
    du = wait_for(du, 0)
    dq_hat = du
    if GAIN:
        dq_hat = scale_columns(du, gain)
    if NEEDS_Q:
        mbarrier.wait(q_full, 0)
        q_hat = read(do_mem, layouts)
        if Q_NORM != NONE:
            q_hat = affine_rows(q_hat, q_r, q_offset, D)
        write(k_mem, unit_rows_backward(dq_hat, q_hat, q_r, softmax_scale, q_eps, Q_NORM, D))
    else:
        write(k_mem, scale_all(dq_hat, softmax_scale))
    store_block(dq_out, tiles, at_k, q_start, q_length, 0, h)
    if WEIGHT_GRADS:
        base = partials_ptr + ((item * splits).to(gl.int64) * H + h) * (D * (1 + Q_BIAS))
        for c in gl.static_range(PARTS):
            store_column_sums(base + c * PART, du[c] * q_hat[c], softmax_scale, scores, D - c * PART, num_warps)
            if Q_BIAS:
                store_column_sums(base + D + c * PART, du[c], softmax_scale, scores, D - c * PART, num_warps)
    tma.store_wait(0)


@functools.lru_cache(1024)
def bound_tile(
    signature: Any, index: int, weight_grads: bool, block: int, warps: int, use_lse: bool,
    registers: int | None,
) -> BoundKernel:  # fmt: skip
    return bind(
        hopper_backward_tile, signature, index, registers,
        WEIGHT_GRADS=weight_grads, BLOCK=block, USE_LSE=use_lse, num_warps=warps,
    )  # fmt: skip


def backward_tile(
    call: Any, index: int, dout: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, partials: Tensor, splits: int,
    weight_grads: bool, *, block: int, warps: int = 4, use_lse: bool = True, registers: int | None = None,
) -> None:  # fmt: skip
    tensors = dict(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq, dk=dk, dv=dv)
    descriptors = ragged_parts(call.signature.width, block, **tensors)
    bound_tile(call.signature, index, weight_grads, block, warps, use_lse, registers)(
        call.grid(index), **descriptors, **call.weight_pointers, **call.work(index), lse_ptr=lse, partials_ptr=partials,
        splits=splits,
    )  # fmt: skip
