"""Varlen attention, backward of segments of at most 256 tokens on Hopper, in Gluon. The maths stands in kernel.py.

A program owns one head of a whole segment, in one warpgroup. 64 rows at a time are its own, and pass by all rows of the
other side, which lie in shared memory: first its own queries by k̂ and v, which gives dq, then its own keys by u and dO,
which gives dk and dv. The scores are computed twice for that, but nothing is exchanged: what belongs to own rows is an
operand or a sum in registers, and P and G go from one product to the next in registers, too.

    resident   k̂, v                            u, dO                           all blocks of 64 rows, by TMA
    own        q_i, dO_i → u_i, dO_i           k_j, v_j → k̂_j, v_j             the next block comes meanwhile
    products   S = u_i·k̂ⱼᵀ    dP = dO_i·vⱼᵀ    Sᵀ = k̂_j·uᵢᵀ    dPᵀ = v_j·dOᵢᵀ
               dq_i += G·k̂ⱼ                    dv_j += Pᵀ·dOᵢ    dk_j += Gᵀ·uᵢ

dP is under way while P is computed, and the next step's S while G is; the products of two programs, which share a
multiprocessor, hide the rest. Unrolled, with a product under way from each step to the next, it takes 907 µs at U256
instead of 662.

Barriers: own_full, of a phase per own block, and keys_full and queries_full, of one phase each, say that TMA's rows are
there. Rows past the segment's end are loaded as zeros and not stored (see hopper_steps.py).

P comes from the forward's lse where the forward had the same scores (USE_LSE), else from the lse of an extra product.
Δ is rowsum(dO ⊙ O).

T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .._jit import BoundKernel
from .hopper_resident_steps import (
    ROWS,
    delta_rows,
    fold,
    load_raw,
    share_vector,
    shared_vector,
    sums_by_thread,
    widen_all,
)
from .hopper_steps import PART, bind, items_of_class, parts, ragged_parts
from .hopper_tile_steps import (
    affine_rows,
    column_parts,
    from_operands,
    load_block,
    load_vector,
    matrix,
    multiply,
    operand,
    operands,
    read,
    row_statistics,
    scale_all,
    scale_columns,
    start_adding,
    start_scores,
    store_block,
    store_warp_sums,
    unit_rows_backward,
    widen,
    write,
)
from .steps import NONE

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the latter until Triton 3.6


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "splits"])
def hopper_backward_resident(
    q_1, k_1, v_1, dout_1, dq_1, dk_1, dv_1, q_2, k_2, v_2, dout_2, dq_2, dk_2, dv_2, out_ptr, lse_ptr, partials_ptr,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, splits,
    q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale,
    score_scale, softmax_scale, key_factor, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr,
    K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr,
    WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr,
    BLOCKS: gl.constexpr, LEAVING: gl.constexpr, USE_LSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    work = gl.program_id(0)
    first_item, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    if work >= items * H:
        return
    DTYPE: gl.constexpr = q_1.dtype
    PARTS: gl.constexpr = 2 if D2 else 1
    TILE_BYTES: gl.constexpr = ROWS * (PART + D2) * 2
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    NEEDS_Q: gl.constexpr = Q_NORM != NONE or WEIGHT_GRADS
    q_in, k_in = column_parts(q_1, q_2, D2), column_parts(k_1, k_2, D2)
    v_in, dout_in = column_parts(v_1, v_2, D2), column_parts(dout_1, dout_2, D2)
    dq_out, dk_out, dv_out = column_parts(dq_1, dq_2, D2), column_parts(dk_1, dk_2, D2), column_parts(dv_1, dv_2, D2)
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D2 or 16, 16])
    layouts: gl.constexpr = (mma_1, mma_2)
    left: gl.constexpr = gl.DotOperandLayout(0, mma_1, 2)
    lefts: gl.constexpr = (left, left)
    row_s: gl.constexpr = gl.SliceLayout(1, mma_1)
    col_s: gl.constexpr = gl.SliceLayout(0, mma_1)
    wide_1: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    wide_2: gl.constexpr = gl.BlockedLayout([1, 8], [256 // (D2 or 16), (D2 or 16) // 8], [num_warps, 1], [1, 0])
    flat: gl.constexpr = gl.SliceLayout(1, wide_1)
    zero_s = gl.zeros([ROWS, ROWS], gl.float32, mma_1)
    zero_d = column_parts(zero_s, zero_s if D2 == 0 else gl.zeros([ROWS, D2 or 16], gl.float32, mma_2), D2)

    resident_1 = gl.allocate_shared_memory(DTYPE, [2 * BLOCKS, 1, 1, 1, ROWS, PART], q_1.layout)
    own_1 = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, ROWS, PART], q_1.layout)
    leaving_1 = gl.allocate_shared_memory(DTYPE, [LEAVING, 1, 1, 1, ROWS, PART], q_1.layout)
    if D2 == 0:
        resident, own, leaving = (resident_1,), (own_1,), (leaving_1,)
    else:
        resident_2 = gl.allocate_shared_memory(DTYPE, [2 * BLOCKS, 1, 1, 1, ROWS, D2], q_2.layout)
        own_2 = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, ROWS, D2], q_2.layout)
        leaving_2 = gl.allocate_shared_memory(DTYPE, [LEAVING, 1, 1, 1, ROWS, D2], q_2.layout)
        resident, own, leaving = (resident_1, resident_2), (own_1, own_2), (leaving_1, leaving_2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_mem = gl.allocate_shared_memory(gl.float32, [BLOCKS, ROWS], VECTOR)
    delta_mem = gl.allocate_shared_memory(gl.float32, [BLOCKS, ROWS], VECTOR)
    vectors = (gl.allocate_shared_memory(gl.float32, [1 + Q_BIAS, PART], VECTOR),)
    if D2:
        vectors = (vectors[0], gl.allocate_shared_memory(gl.float32, [1 + Q_BIAS, D2], VECTOR))
    keys_full = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    queries_full = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BLOCKS):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(queries_full.index(i), count=1)
    mbarrier.init(own_full, count=1)
    fence_async_shared()
    barrier()

    h = work % H
    item = first_item + work // H
    base = items_ptr + item * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    q_blocks = gl.minimum(gl.cdiv(q_length, ROWS), BLOCKS)
    k_blocks = gl.minimum(gl.cdiv(k_length, ROWS), BLOCKS)
    for j in range(k_blocks):
        full = keys_full.index(j)
        mbarrier.expect(full, 2 * TILE_BYTES)
        load_block(k_in, resident, j, full, k_start, k_length, j * ROWS, h)
        load_block(v_in, resident, BLOCKS + j, full, k_start, k_length, j * ROWS, h)
    mbarrier.expect(own_full, 2 * TILE_BYTES)
    if q_blocks > 0:
        load_block(q_in, own, 0, own_full, q_start, q_length, 0, h)
        load_block(dout_in, own, 1, own_full, q_start, q_length, 0, h)
    else:
        load_block(k_in, own, 0, own_full, k_start, k_length, 0, h)
        load_block(v_in, own, 1, own_full, k_start, k_length, 0, h)
    q_own, do_own = matrix(own, 0, ROWS, D2), matrix(own, 1, ROWS, D2)

    if GAIN:
        k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
        gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2), k_weight)
        share_vector(gain, vectors, 0)
    if Q_BIAS:
        shift = load_vector(q_bias_ptr + h * q_bias_stride, Q_BIAS, 0.0, layouts, D, D2)
        if GAIN:
            shift = multiply(shift, k_weight)
        share_vector(shift, vectors, 1)

    # ---- O and lse of the first queries, on their way to registers
    rows = gl.arange(0, ROWS, flat)
    cols = gl.arange(0, PART, gl.SliceLayout(0, wide_1))
    out_ptr += (q_start.to(gl.int64) * H + h) * D
    lse_ptr += h.to(gl.int64) * tokens + q_start
    pointers_1 = out_ptr + rows[:, None] * (H * D) + cols[None, :]
    inside_1 = cols[None, :] < D
    out_1 = gl.load(pointers_1, mask=(rows < q_length)[:, None] & inside_1, other=0.0)
    if D2:
        rows_2 = gl.arange(0, ROWS, gl.SliceLayout(1, wide_2))
        cols_2 = PART + gl.arange(0, D2 or 16, gl.SliceLayout(0, wide_2))
        pointers_2 = out_ptr + rows_2[:, None] * (H * D) + cols_2[None, :]
        inside_2 = cols_2[None, :] < D
        out_2 = gl.load(pointers_2, mask=(rows_2 < q_length)[:, None] & inside_2, other=0.0)
    else:
        out_2 = out_1
    if USE_LSE:
        lse_own = gl.load(lse_ptr + rows, mask=rows < q_length, other=float("inf"))

    # ---- k̂ in place
    if K_NORM != NONE:
        for j in range(k_blocks):
            mbarrier.wait(keys_full.index(j), 0)
            k_mem = matrix(resident, j, ROWS, D2)
            k = read(k_mem, layouts)
            k_r, k_offset = row_statistics(k, k_eps, K_NORM, D)
            write(k_mem, affine_rows(k, k_r, k_offset, D))
        barrier()
    else:
        for j in range(k_blocks):
            mbarrier.wait(keys_full.index(j), 0)

    # ---- dq, by blocks of own queries
    if WEIGHT_GRADS:
        gain_sums = (sums_by_thread(zero_d[0], num_warps),)
        if D2:
            gain_sums = (gain_sums[0], sums_by_thread(zero_d[1], num_warps))
        shift_sums = gain_sums
    for i in range(q_blocks):
        mbarrier.wait(own_full, i & 1)
        q_raw = load_raw(q_own, layouts)
        do = load_raw(do_own, lefts)
        delta = delta_rows(do_own[0].load(wide_1), out_1)
        if D2:
            delta += gl.convert_layout(delta_rows(do_own[1].load(wide_2), out_2), flat)
        delta_mem.index(i).store(delta)
        if USE_LSE:
            lse_mem.index(i).store(lse_own)
        barrier()
        if i + 1 < q_blocks:
            mbarrier.expect(own_full, 2 * TILE_BYTES)
            load_block(q_in, own, 0, own_full, q_start, q_length, (i + 1) * ROWS, h)
            load_block(dout_in, own, 1, own_full, q_start, q_length, (i + 1) * ROWS, h)
        elif k_blocks > 0:
            mbarrier.expect(own_full, 2 * TILE_BYTES)
            load_block(k_in, own, 0, own_full, k_start, k_length, 0, h)
            load_block(v_in, own, 1, own_full, k_start, k_length, 0, h)
        ahead = (i + 1) * ROWS
        out_1 = gl.load(pointers_1 + ahead * (H * D), mask=(rows + ahead < q_length)[:, None] & inside_1, other=0.0)
        if D2:
            inside = (rows_2 + ahead < q_length)[:, None] & inside_2
            out_2 = gl.load(pointers_2 + ahead * (H * D), mask=inside, other=0.0)
        else:
            out_2 = out_1
        if USE_LSE:
            lse_own = gl.load(lse_ptr + ahead + rows, mask=rows + ahead < q_length, other=float("inf"))
            lse = lse_mem.index(i).load(row_s)
        delta = delta_mem.index(i).load(row_s)
        if FOLD:
            u_rows, q_r, q_offset = fold(
                widen_all(q_raw), vectors, layouts, q_eps, fold_scale, Q_NORM, FOLD, GAIN, Q_BIAS, D
            )
            u = operands(u_rows, DTYPE, left)
        else:
            q_r = gl.full([ROWS], 1.0, gl.float32, row_s)
            q_offset = gl.zeros_like(q_r)
            u = operands(q_raw, DTYPE, left)

        if not USE_LSE:
            m = gl.full([ROWS], -float("inf"), gl.float32, row_s)
            l = gl.zeros_like(m)
            for j in range(k_blocks):
                s = warpgroup_mma_wait(0, deps=[start_scores(u, matrix(resident, j, ROWS, D2), zero_s)])
                if not FOLD:
                    s = s * score_scale
                s = gl.where((gl.arange(0, ROWS, col_s) < k_length - j * ROWS)[None, :], s, -float("inf"))
                m_new = gl.maximum(m, gl.max(s, 1))
                l = l * gl.exp2(m - m_new) + gl.sum(gl.exp2(s - m_new[:, None]), 1)
                m = m_new
            lse = gl.where(i * ROWS + gl.arange(0, ROWS, row_s) < q_length, m + gl.log2(l), float("inf"))
            lse_mem.index(i).store(lse)

        dq = zero_d
        if k_blocks > 0:
            s = warpgroup_mma_wait(0, deps=[start_scores(u, matrix(resident, 0, ROWS, D2), zero_s)])
            for j in range(k_blocks - 1):
                dp = start_scores(do, matrix(resident, BLOCKS + j, ROWS, D2), zero_s)
                if not FOLD:
                    s = s * score_scale
                p = gl.exp2(s - lse[:, None])
                mbarrier.wait(keys_full.index(0), 0)
                dp, p = warpgroup_mma_wait(0, deps=[dp, p])
                s_next = start_scores(u, matrix(resident, j + 1, ROWS, D2), zero_s)
                g = operand(p * (dp - delta[:, None]), DTYPE, left)
                dq = start_adding(g, matrix(resident, j, ROWS, D2), dq)
                if D2 == 0:
                    first, s = warpgroup_mma_wait(0, deps=[dq[0], s_next])
                    dq = (first,)
                else:
                    first, second, s = warpgroup_mma_wait(0, deps=[dq[0], dq[1], s_next])
                    dq = (first, second)
            j = k_blocks - 1
            dp = start_scores(do, matrix(resident, BLOCKS + j, ROWS, D2), zero_s)
            if not FOLD:
                s = s * score_scale
            p = gl.exp2(s - lse[:, None])
            p = gl.where((gl.arange(0, ROWS, col_s) < k_length - j * ROWS)[None, :], p, 0.0)
            mbarrier.wait(keys_full.index(0), 0)
            dp, p = warpgroup_mma_wait(0, deps=[dp, p])
            g = operand(p * (dp - delta[:, None]), DTYPE, left)
            dq = start_adding(g, matrix(resident, j, ROWS, D2), dq)
            if D2 == 0:
                dq = (warpgroup_mma_wait(0, deps=[dq[0]]),)
            else:
                dq = warpgroup_mma_wait(0, deps=[dq[0], dq[1]])

        tma.store_wait(0)
        barrier()
        dq_hat = dq
        if GAIN:
            dq_hat = scale_columns(dq, shared_vector(vectors, 0, layouts))
        dq_mem = matrix(leaving, 0, ROWS, D2)
        if NEEDS_Q:
            q_hat = widen_all(q_raw)
            if Q_NORM != NONE:
                q_hat = affine_rows(q_hat, q_r, q_offset, D)
            write(dq_mem, unit_rows_backward(dq_hat, q_hat, q_r, softmax_scale, q_eps, Q_NORM, D))
        else:
            write(dq_mem, scale_all(dq_hat, softmax_scale))
        store_block(dq_out, leaving, 0, q_start, q_length, i * ROWS, h)
        if WEIGHT_GRADS:
            if D2 == 0:
                gain_sums = (gain_sums[0] + sums_by_thread(dq[0] * q_hat[0], num_warps),)
                if Q_BIAS:
                    shift_sums = (shift_sums[0] + sums_by_thread(dq[0], num_warps),)
            else:
                gain_sums = (
                    gain_sums[0] + sums_by_thread(dq[0] * q_hat[0], num_warps),
                    gain_sums[1] + sums_by_thread(dq[1] * q_hat[1], num_warps),
                )
                if Q_BIAS:
                    shift_sums = (
                        shift_sums[0] + sums_by_thread(dq[0], num_warps),
                        shift_sums[1] + sums_by_thread(dq[1], num_warps),
                    )

    # ---- u in place
    barrier()
    for i in range(q_blocks):
        full = queries_full.index(i)
        mbarrier.expect(full, 2 * TILE_BYTES)
        load_block(q_in, resident, i, full, q_start, q_length, i * ROWS, h)
        load_block(dout_in, resident, BLOCKS + i, full, q_start, q_length, i * ROWS, h)
    if WEIGHT_GRADS:
        tma.store_wait(0)
        barrier()
        base = partials_ptr + ((item * splits).to(gl.int64) * H + h) * (D * (1 + Q_BIAS))
        for c in gl.static_range(PARTS):
            memory = leaving[c].index(0)
            store_warp_sums(base + c * PART, gl.sum(gain_sums[c], 1), softmax_scale, memory, D - c * PART, num_warps)
            if Q_BIAS:
                barrier()
                store_warp_sums(
                    base + D + c * PART, gl.sum(shift_sums[c], 1), softmax_scale, memory, D - c * PART, num_warps
                )
    for i in range(q_blocks):
        mbarrier.wait(queries_full.index(i), 0)
        if FOLD:
            q_mem = matrix(resident, i, ROWS, D2)
            u_rows, q_r, q_offset = fold(
                read(q_mem, layouts), vectors, layouts, q_eps, fold_scale, Q_NORM, FOLD, GAIN, Q_BIAS, D
            )
            write(q_mem, u_rows)
    barrier()

    # ---- dk and dv, by blocks of own keys
    for j in range(k_blocks):
        mbarrier.wait(own_full, (q_blocks + j) & 1)
        k_raw = load_raw(q_own, layouts)
        v = load_raw(do_own, lefts)
        barrier()
        if j + 1 < k_blocks:
            mbarrier.expect(own_full, 2 * TILE_BYTES)
            load_block(k_in, own, 0, own_full, k_start, k_length, (j + 1) * ROWS, h)
            load_block(v_in, own, 1, own_full, k_start, k_length, (j + 1) * ROWS, h)
        if K_NORM != NONE:
            k_rows = widen_all(k_raw)
            k_r, k_offset = row_statistics(k_rows, k_eps, K_NORM, D)
            k = operands(affine_rows(k_rows, k_r, k_offset, D), DTYPE, left)
        else:
            k_r = gl.full([ROWS], 1.0, gl.float32, row_s)
            k = operands(k_raw, DTYPE, left)

        dk = zero_d
        dv = zero_d
        if q_blocks > 0:
            s = warpgroup_mma_wait(0, deps=[start_scores(k, matrix(resident, 0, ROWS, D2), zero_s)])
            for i in range(q_blocks - 1):
                do_mem = matrix(resident, BLOCKS + i, ROWS, D2)
                dp = start_scores(v, do_mem, zero_s)
                if not FOLD:
                    s = s * score_scale
                lse = lse_mem.index(i).load(col_s)
                p = operand(gl.exp2(s - lse[None, :]), DTYPE, left)
                dv = start_adding(p, do_mem, dv)
                s_next = start_scores(k, matrix(resident, i + 1, ROWS, D2), zero_s)
                delta = delta_mem.index(i).load(col_s)
                dp = warpgroup_mma_wait(2 * PARTS, deps=[dp])
                p_wide = widen(gl.convert_layout(p, mma_1))
                g = operand(p_wide * (dp - delta[None, :]), DTYPE, left)
                dk = start_adding(g, matrix(resident, i, ROWS, D2), dk)
                if D2 == 0:
                    dk_first, dv_first, s = warpgroup_mma_wait(0, deps=[dk[0], dv[0], s_next])
                    dk, dv = (dk_first,), (dv_first,)
                else:
                    dk_first, dk_second, dv_first, dv_second, s = warpgroup_mma_wait(
                        0, deps=[dk[0], dk[1], dv[0], dv[1], s_next]
                    )
                    dk, dv = (dk_first, dk_second), (dv_first, dv_second)
            i = q_blocks - 1
            do_mem = matrix(resident, BLOCKS + i, ROWS, D2)
            dp = start_scores(v, do_mem, zero_s)
            if not FOLD:
                s = s * score_scale
            lse = lse_mem.index(i).load(col_s)
            p = operand(gl.exp2(s - lse[None, :]), DTYPE, left)
            dv = start_adding(p, do_mem, dv)
            delta = delta_mem.index(i).load(col_s)
            dp = warpgroup_mma_wait(PARTS, deps=[dp])
            p_wide = widen(gl.convert_layout(p, mma_1))
            g = operand(p_wide * (dp - delta[None, :]), DTYPE, left)
            dk = start_adding(g, matrix(resident, i, ROWS, D2), dk)
            if D2 == 0:
                dk_first, dv_first = warpgroup_mma_wait(0, deps=[dk[0], dv[0]])
                dk, dv = (dk_first,), (dv_first,)
            else:
                dk_first, dk_second, dv_first, dv_second = warpgroup_mma_wait(0, deps=[dk[0], dk[1], dv[0], dv[1]])
                dk, dv = (dk_first, dk_second), (dv_first, dv_second)

        tma.store_wait(0)
        barrier()
        write(matrix(leaving, 0, ROWS, D2), dv)
        store_block(dv_out, leaving, 0, k_start, k_length, j * ROWS, h)
        if LEAVING == 1:
            tma.store_wait(0)
            barrier()
        k_hat = from_operands(k, layouts)
        write(matrix(leaving, LEAVING - 1, ROWS, D2), unit_rows_backward(dk, k_hat, k_r, key_factor, k_eps, K_NORM, D))
        store_block(dk_out, leaving, LEAVING - 1, k_start, k_length, j * ROWS, h)
    tma.store_wait(0)


@functools.lru_cache(1024)
def bound_resident(
    signature: Any, index: int, weight_grads: bool, block: int, use_lse: bool,
    registers: int | None,
) -> BoundKernel:  # fmt: skip
    _, second = parts(signature.width)
    return bind(
        hopper_backward_resident, signature, index, registers,
        WEIGHT_GRADS=weight_grads, BLOCKS=block // ROWS.value, LEAVING=1 if second else 2,
        USE_LSE=use_lse, num_warps=4,
    )  # fmt: skip


def backward_resident(
    call: Any, index: int, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    partials: Tensor, splits: int, weight_grads: bool, *, block: int, use_lse: bool = True,
    registers: int | None = None,
) -> None:  # fmt: skip
    tensors = dict(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq, dk=dk, dv=dv)
    descriptors = ragged_parts(call.signature.width, ROWS.value, **tensors)
    bound_resident(call.signature, index, weight_grads, block, use_lse, registers)(
        call.grid(index), **descriptors, **call.weight_pointers, **call.work(index), out_ptr=out, lse_ptr=lse,
        partials_ptr=partials, splits=splits,
    )  # fmt: skip
