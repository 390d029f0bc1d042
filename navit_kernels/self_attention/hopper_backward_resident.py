"""Varlen attention, backward of segments of at most 256 tokens on Hopper, in Gluon. The maths stands in kernel.py.

T tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_backward_tile import (
    add_columns,
    affine_rows,
    load_vector,
    multiply,
    read,
    row_dot,
    row_statistics,
    scale_all,
    scale_columns,
    store_column_sums,
    store_tile,
    unit_rows_backward,
    widen,
    write,
)
from .hopper_steps import PART, load_tile, ragged, segment_rows
from .steps import NONE

KEYS = gl.constexpr(64)  # of a block


@gluon.jit
def load_item(items_ptr, item, tokens, tokens_k):
    """(q_start, q_length, k_start, k_length) of a work item; see plan.py."""
    base = items_ptr + item * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    return q_start, q_length, k_start, gl.minimum(gl.load(base + 3), tokens_k - k_start)


@gluon.jit
def opaque_zero():
    """0 as the compiler does not know it: tiles at this index have no addresses to move out of a loop, where they
    would be spilled."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def produce(
    q_in, k_in, v_in, dout_in, out_in, items_ptr, first_item, count, tokens, tokens_k, q_tiles, row_tiles,
    k_tiles, v_tiles, q_full, q_empty, rows_full, rows_empty, kv_full, kv_empty, H: gl.constexpr, ROWS: gl.constexpr,
    SLOTS: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    n = 0
    it = 0
    for work in range(gl.program_id(0), count, gl.num_programs(0)):
        h = work % H
        q_start, q_length, k_start, k_length = load_item(items_ptr, first_item + work // H, tokens, tokens_k)
        slot = n % QUEUE
        mbarrier.wait(q_empty.index(slot), ((n // QUEUE) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), ROWS * PART * 2)
        load_tile(q_in, segment_rows(q_start, q_length, 0, h, 0), q_full.index(slot), q_tiles.index(slot))
        blocks = gl.maximum(gl.cdiv(k_length, KEYS), 1)
        for j in range(blocks + 1):
            if j == 1:
                mbarrier.wait(rows_empty, (n & 1) ^ 1)
                mbarrier.expect(rows_full, 2 * ROWS * PART * 2)
                load_tile(dout_in, segment_rows(q_start, q_length, 0, h, 0), rows_full, row_tiles.index(2))
                load_tile(out_in, segment_rows(q_start, q_length, 0, h, 0), rows_full, row_tiles.index(1))
            if j < blocks:
                s = it % SLOTS
                mbarrier.wait(kv_empty.index(s), ((it // SLOTS) & 1) ^ 1)
                mbarrier.expect(kv_full.index(s), 2 * KEYS * PART * 2)
                load_tile(k_in, segment_rows(k_start, k_length, j * KEYS, h, 0), kv_full.index(s), k_tiles.index(s))
                load_tile(v_in, segment_rows(k_start, k_length, j * KEYS, h, 0), kv_full.index(s), v_tiles.index(s))
                it += 1
        n += 1


@gluon.jit
def normalize_block(k_tile, k_eps, K_NORM: gl.constexpr, D: gl.constexpr, layouts: gl.constexpr):
    """k̂ in place; its sizes."""
    k_mem = (k_tile.reshape([KEYS, PART]),)
    if K_NORM != NONE:
        k = read(k_mem, layouts)
        r, offset = row_statistics(k, k_eps, K_NORM, D)
        write(k_mem, affine_rows(k, r, offset, D))
        return r
    else:
        return gl.full([KEYS], 1.0, gl.float32, gl.SliceLayout(1, layouts[0]))


@gluon.jit
def probabilities(s, lse, score_scale, keys, FOLD: gl.constexpr, DTYPE: gl.constexpr, col_s: gl.constexpr):
    if not FOLD:
        s = s * score_scale
    p = gl.exp2(s - lse[:, None])
    if keys < KEYS:
        p = gl.where((gl.arange(0, KEYS, col_s) < keys)[None, :], p, 0.0)
    return p.to(DTYPE)


@gluon.jit
def finish_block(
    a, dv, k_r, k_tile, v_tile, dk_out, dv_out, k_start, k_length, row, h, k_eps, key_factor, K_NORM: gl.constexpr,
    D: gl.constexpr, layouts: gl.constexpr,
):  # fmt: skip
    """dk and dv leave by their block's own tiles."""
    k_mem = (k_tile.reshape([KEYS, PART]),)
    write((v_tile.reshape([KEYS, PART]),), (dv,))
    store_tile(dv_out, segment_rows(k_start, k_length, row, h, 0), v_tile)
    write(k_mem, unit_rows_backward((a,), read(k_mem, layouts), k_r, key_factor, k_eps, K_NORM, D))
    store_tile(dk_out, segment_rows(k_start, k_length, row, h, 0), k_tile)


@gluon.jit
def compute(
    q_in, dq_out, dk_out, dv_out, lse_ptr, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item,
    count, tokens, tokens_k, q_tiles, row_tiles, k_tiles, v_tiles, sums, q_full, q_empty, rows_full,
    rows_empty, kv_full, kv_empty, again_full, q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr,
    k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale, score_scale, softmax_scale, key_factor, H: gl.constexpr,
    D: gl.constexpr, Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr,
    K_WEIGHT: gl.constexpr, FOLD: gl.constexpr, WEIGHT_GRADS: gl.constexpr, SPLITS: gl.constexpr, ROWS: gl.constexpr,
    SLOTS: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = q_in.dtype
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    NEEDS_Q: gl.constexpr = Q_NORM != NONE or WEIGHT_GRADS
    mma_q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 16])
    mma_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, PART * 4 // WARPS, 16])
    of_q: gl.constexpr = (mma_q, mma_q)
    of_k: gl.constexpr = (mma_k, mma_k)
    row_q: gl.constexpr = gl.SliceLayout(1, mma_q)
    col_q: gl.constexpr = gl.SliceLayout(0, mma_q)
    zero_q = gl.zeros([ROWS, PART], gl.float32, mma_q)
    zero_k = gl.zeros([KEYS, PART], gl.float32, mma_k)
    n = 0
    it = 0
    for work in range(gl.program_id(0), count, gl.num_programs(0)):
        h = work % H
        item = first_item + work // H
        q_start, q_length, k_start, k_length = load_item(items_ptr, item, tokens, tokens_k)
        blocks = gl.maximum(gl.cdiv(k_length, KEYS), 1)
        queue = n % QUEUE
        q_tile = q_tiles.index(queue)
        q_mem = (q_tile.reshape([ROWS, PART]),)
        zero = opaque_zero()
        p_tile, g_tile, do_tile = row_tiles.index(zero), row_tiles.index(1 + zero), row_tiles.index(2 + zero)
        p_mem, g_mem, do_mem = p_tile.reshape([ROWS, PART]), g_tile.reshape([ROWS, PART]), do_tile.reshape([ROWS, PART])
        rows = gl.arange(0, ROWS, row_q)
        lse = gl.load(lse_ptr + h.to(gl.int64) * tokens + q_start + rows, mask=rows < q_length, other=float("inf"))
        if GAIN:
            k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, of_q, D, 0)
            gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, of_q, D, 0), k_weight)
        if Q_BIAS:
            shift = load_vector(q_bias_ptr + h * q_bias_stride, Q_BIAS, 0.0, of_q, D, 0)
            if GAIN:
                shift = multiply(shift, k_weight)

        # ---- u and the first k̂ in place
        mbarrier.wait(q_full.index(queue), (n // QUEUE) & 1)
        if Q_NORM != NONE:
            q = read(q_mem, of_q)
            q_r, q_offset = row_statistics(q, q_eps, Q_NORM, D)
            u = affine_rows(q, q_r * fold_scale, q_offset * fold_scale, D)
        else:
            q_r = gl.full([ROWS], 1.0, gl.float32, row_q)
            q_offset = gl.zeros_like(q_r)
            if FOLD:
                u = scale_all(read(q_mem, of_q), fold_scale)
        if FOLD:
            if GAIN:
                u = scale_columns(u, gain)
            if Q_BIAS:
                u = add_columns(u, scale_all(shift, fold_scale))
            write(q_mem, u)
        s = it % SLOTS
        mbarrier.wait(kv_full.index(s), (it // SLOTS) & 1)
        k_r = normalize_block(k_tiles.index(s), k_eps, K_NORM, D, of_k)
        fence_async_shared()

        # ---- the first block's P and G
        scores = warpgroup_mma(q_mem[0], k_tiles.index(s).reshape([KEYS, PART]).permute([1, 0]), zero_q, use_acc=False, is_async=True)
        mbarrier.wait(rows_full, n & 1)
        delta = row_dot((widen(do_mem.load(mma_q)),), (widen(g_mem.load(mma_q)),))
        mbarrier.wait(rows_full, n & 1)
        scores, delta = warpgroup_mma_wait(0, deps=[scores, delta])
        p = probabilities(scores, lse, score_scale, k_length, FOLD, DTYPE, col_q)
        p_mem.store(p)
        fence_async_shared()
        dp = warpgroup_mma(do_mem, v_tiles.index(s).reshape([KEYS, PART]).permute([1, 0]), zero_q, use_acc=False, is_async=True)
        k_r_next = k_r
        if blocks > 1:
            t = (it + 1) % SLOTS
            mbarrier.wait(kv_full.index(t), ((it + 1) // SLOTS) & 1)
            k_r_next = normalize_block(k_tiles.index(t), k_eps, K_NORM, D, of_k)
        mbarrier.wait(rows_full, n & 1)
        dp = warpgroup_mma_wait(0, deps=[dp])
        g_mem.store((widen(p_mem.load(mma_q)) * (dp - delta[:, None])).to(DTYPE))
        fence_async_shared()

        du = gl.zeros([ROWS, PART], gl.float32, mma_q)
        for j in range(1, blocks):
            zero = opaque_zero()
            p_mem, g_mem = row_tiles.index(zero).reshape([ROWS, PART]), row_tiles.index(1 + zero).reshape([ROWS, PART])
            do_mem = row_tiles.index(2 + zero).reshape([ROWS, PART])
            u_mem = q_tiles.index(queue + zero).reshape([ROWS, PART])
            b = it % SLOTS  # the block before
            s = (it + 1) % SLOTS
            k_b = k_tiles.index(b).reshape([KEYS, PART])
            k_s = k_tiles.index(s).reshape([KEYS, PART])
            scores = warpgroup_mma(u_mem, k_s.permute([1, 0]), zero_q, use_acc=False, is_async=True)
            dv = warpgroup_mma(p_mem.permute([1, 0]), do_mem, zero_k, use_acc=False, is_async=True)
            a = warpgroup_mma(g_mem.permute([1, 0]), u_mem, zero_k, use_acc=False, is_async=True)
            du_ = warpgroup_mma(g_mem, k_b, du, is_async=True)
            scores = warpgroup_mma_wait(3, deps=[scores])
            p = probabilities(scores, lse, score_scale, k_length - j * KEYS, FOLD, DTYPE, col_q)
            mbarrier.wait(rows_full, n & 1)
            dv, a, du, p = warpgroup_mma_wait(0, deps=[dv, a, du_, p])
            p_mem.store(p)
            fence_async_shared()
            dp = warpgroup_mma(do_mem, v_tiles.index(s).reshape([KEYS, PART]).permute([1, 0]), zero_q, use_acc=False, is_async=True)
            if j > 1:
                tma.store_wait(0)
                mbarrier.arrive(kv_empty.index((it + SLOTS - 1) % SLOTS), count=1)
            finish_block(a, dv, k_r, k_tiles.index(b), v_tiles.index(b), dk_out, dv_out, k_start, k_length, (j - 1) * KEYS, h, k_eps, key_factor, K_NORM, D, of_k)
            k_r = k_r_next
            if j + 1 < blocks:
                t = (it + 2) % SLOTS
                mbarrier.wait(kv_full.index(t), ((it + 2) // SLOTS) & 1)
                k_r_next = normalize_block(k_tiles.index(t), k_eps, K_NORM, D, of_k)
            mbarrier.wait(rows_full, n & 1)
            dp = warpgroup_mma_wait(0, deps=[dp])
            g_mem.store((widen(p_mem.load(mma_q)) * (dp - delta[:, None])).to(DTYPE))
            fence_async_shared()
            it += 1

        # ---- the last block, and dq
        zero = opaque_zero()
        p_tile = row_tiles.index(zero)
        p_mem, g_mem = p_tile.reshape([ROWS, PART]), row_tiles.index(1 + zero).reshape([ROWS, PART])
        do_mem = row_tiles.index(2 + zero).reshape([ROWS, PART])
        q_tile = q_tiles.index(queue + zero)
        q_mem = (q_tile.reshape([ROWS, PART]),)
        b = it % SLOTS
        dv = warpgroup_mma(p_mem.permute([1, 0]), do_mem, zero_k, use_acc=False, is_async=True)
        a = warpgroup_mma(g_mem.permute([1, 0]), q_mem[0], zero_k, use_acc=False, is_async=True)
        du_ = warpgroup_mma(g_mem, k_tiles.index(b).reshape([KEYS, PART]), du, is_async=True)
        dv, a, du = warpgroup_mma_wait(0, deps=[dv, a, du_])
        mbarrier.arrive(rows_empty, count=1)
        if NEEDS_Q:
            mbarrier.expect(again_full, ROWS * PART * 2)
            load_tile(q_in, segment_rows(q_start, q_length, 0, h, 0), again_full, p_tile)
        if GAIN:  # loaded again: keeping it would cost registers
            k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, of_q, D, 0)
            gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, of_q, D, 0), k_weight)
        if blocks > 1:
            tma.store_wait(0)
            mbarrier.arrive(kv_empty.index((it + SLOTS - 1) % SLOTS), count=1)
        finish_block(a, dv, k_r, k_tiles.index(b), v_tiles.index(b), dk_out, dv_out, k_start, k_length, (blocks - 1) * KEYS, h, k_eps, key_factor, K_NORM, D, of_k)
        dq_hat = (du,)
        if GAIN:
            dq_hat = scale_columns(dq_hat, gain)
        if NEEDS_Q:
            mbarrier.wait(again_full, n & 1)
            q_hat = read((p_mem,), of_q)
            if Q_NORM != NONE:
                q_hat = affine_rows(q_hat, q_r, q_offset, D)
            write(q_mem, unit_rows_backward(dq_hat, q_hat, q_r, softmax_scale, q_eps, Q_NORM, D))
        else:
            write(q_mem, scale_all(dq_hat, softmax_scale))
        store_tile(dq_out, segment_rows(q_start, q_length, 0, h, 0), q_tile)
        if WEIGHT_GRADS:
            base = partials_ptr + ((item * SPLITS).to(gl.int64) * H + h) * (D * (1 + Q_BIAS))
            store_column_sums(base, du * q_hat[0], softmax_scale, sums, D, WARPS)
            if Q_BIAS:
                store_column_sums(base + D, du, softmax_scale, sums, D, WARPS)
        tma.store_wait(0)
        mbarrier.arrive(kv_empty.index(b), count=1)
        mbarrier.arrive(q_empty.index(queue), count=1)
        it += 1
        n += 1


@gluon.jit(do_not_specialize=["first_item", "count", "tokens", "tokens_k"])
def hopper_backward_resident(
    q_in, q_block, k_in, v_in, dout_in, out_in, dq_out, dk_out, dv_out, lse_ptr, partials_ptr, q_weight_ptr, q_bias_ptr,
    k_weight_ptr, items_ptr, offsets_ptr, first_item, count, tokens, tokens_k, q_weight_stride: gl.constexpr,
    q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale, score_scale, softmax_scale,
    key_factor, H: gl.constexpr, D: gl.constexpr, Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr,
    Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr, WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr,
    ON_DEVICE: gl.constexpr, SPLITS: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    if ON_DEVICE:
        first_item = gl.load(offsets_ptr + CLASS)
        count = (gl.load(offsets_ptr + CLASS + 1) - first_item) * H
    DTYPE: gl.constexpr = q_in.dtype
    q_tiles = gl.allocate_shared_memory(DTYPE, [QUEUE, 1, 1, 1, ROWS, PART], q_in.layout)
    row_tiles = gl.allocate_shared_memory(DTYPE, [3, 1, 1, 1, ROWS, PART], q_in.layout)  # P; G, at first O; dO
    k_tiles = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, 1, KEYS, PART], q_in.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, 1, KEYS, PART], q_in.layout)
    sums = gl.allocate_shared_memory(gl.float32, [gl.num_warps(), PART], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    q_full = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    rows_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    rows_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    again_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUEUE):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    mbarrier.init(rows_full, count=1)
    mbarrier.init(rows_empty, count=1)
    mbarrier.init(again_full, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (compute, (
            q_in, dq_out, dk_out, dv_out, lse_ptr, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr,
            first_item, count, tokens, tokens_k, q_tiles, row_tiles, k_tiles, v_tiles, sums, q_full,
            q_empty, rows_full, rows_empty, kv_full, kv_empty, again_full, q_weight_stride, q_bias_stride,
            k_weight_stride, q_eps, k_eps, fold_scale, score_scale, softmax_scale, key_factor, H, D, Q_NORM, K_NORM,
            Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD, WEIGHT_GRADS, SPLITS, ROWS, SLOTS, QUEUE,
        )),
        (produce, (
            q_in, k_in, v_in, dout_in, out_in, items_ptr, first_item, count, tokens, tokens_k, q_tiles, row_tiles,
            k_tiles, v_tiles, q_full, q_empty, rows_full, rows_empty, kv_full, kv_empty, H, ROWS, SLOTS, QUEUE,
        )),
    ], [1], [24])  # fmt: skip


def backward_resident(
    call: Any, index: int, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, partials: Tensor,
    splits: int, weight_grads: bool, *, programs: int = 132, slots: int = 4, queue: int = 2,
) -> None:  # fmt: skip
    norms = call.norms
    rows = dict(q_in=call.q, dout_in=dout, out_in=out, dq_out=dq)
    blocks = dict(q_block=call.q, k_in=call.k, v_in=call.v, dk_out=dk, dv_out=dv)
    (count,) = call.grid(index)
    hopper_backward_resident[(min(programs, count),)](
        **{name: ragged(x, 256, PART.value) for name, x in rows.items()},
        **{name: ragged(x, KEYS.value, PART.value) for name, x in blocks.items()},
        **call.weights(), **call.work(index), lse_ptr=lse, partials_ptr=partials, count=count, q_eps=norms.q_eps,
        k_eps=norms.k_eps, fold_scale=call.fold_scale, score_scale=call.score_scale, softmax_scale=call.softmax_scale,
        key_factor=call.key_factor, H=call.heads, D=call.width, Q_NORM=norms.q_kind, K_NORM=norms.k_kind,
        FOLD=call.fold, WEIGHT_GRADS=weight_grads, SPLITS=splits, ROWS=256, SLOTS=slots, QUEUE=queue, num_warps=8,
    )  # fmt: skip
