"""Varlen attention, backward of short segments on Hopper, in Gluon. The maths stands in kernel.py.

T tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language._core import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_steps import PART, load_tile, parts, ragged, segment_rows
from .steps import L2, LAYER_NORM, NONE

# the latter until Triton 3.6
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reinterpret = getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret


@gluon.jit
def column_parts(first, second, D2: gl.constexpr):
    if D2 == 0:
        return (first,)
    else:
        return (first, second)


@gluon.jit
def load_rows(source, tiles, i, full, start, length, h):
    """All rows of a segment's head into tile i, by TMA."""
    for c in gl.static_range(len(tiles)):
        load_tile(source[c], segment_rows(start, length, 0, h, c * PART), full, tiles[c].index(i))


@gluon.jit
def store_rows(target, tiles, i, start, length, h):
    for c in gl.static_range(len(tiles)):
        store_tile(target[c], segment_rows(start, length, 0, h, c * PART), tiles[c].index(i))


@gluon.jit
def matrix(tiles, i, ROWS: gl.constexpr, D2: gl.constexpr):
    """Tile i as matrices [ROWS, columns of the part]."""
    first = tiles[0].index(i).reshape([ROWS, PART])
    if D2 == 0:
        return (first,)
    else:
        return (first, tiles[1].index(i).reshape([ROWS, D2]))


@gluon.jit
def widen(x):
    """float32 of a 16-bit x; two instructions for two bfloat16, where the compiler takes three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(gl.float32)


@gluon.jit
def read(x, layouts):
    """Float32 parts of a matrix in shared memory."""
    first = widen(x[0].load(layouts[0]))
    if len(x) == 1:
        return (first,)
    else:
        return (first, widen(x[1].load(layouts[1])))


@gluon.jit
def write(x, values):
    """Values into a matrix in shared memory, for the matrix unit and TMA to see."""
    for c in gl.static_range(len(x)):
        x[c].store(values[c].to(x[c].dtype))
    fence_async_shared()


@gluon.jit
def start_dot_rows(x, y, zero, START: gl.constexpr, ROWS: gl.constexpr):
    """x[START : START + ROWS] · yᵀ."""
    product = warpgroup_mma(x[0].slice(START, ROWS), y[0].permute([1, 0]), zero, use_acc=False, is_async=True)
    if len(x) == 2:
        product = warpgroup_mma(x[1].slice(START, ROWS), y[1].permute([1, 0]), product, is_async=True)
    return product


@gluon.jit
def start_dot_values(p, y, zero):
    """p · y."""
    first = warpgroup_mma(p, y[0], zero[0], use_acc=False, is_async=True)
    if len(y) == 1:
        return (first,)
    else:
        return (first, warpgroup_mma(p, y[1], zero[1], use_acc=False, is_async=True))


@gluon.jit
def wait_for(x, LATER: gl.constexpr):
    """Parts of a product, once at most LATER others are under way."""
    if len(x) == 1:
        return (warpgroup_mma_wait(LATER, deps=[x[0]]),)
    else:
        return warpgroup_mma_wait(LATER, deps=[x[0], x[1]])


@gluon.jit
def row_dot(x, y):
    total = gl.sum(x[0] * y[0], 1)
    if len(x) == 2:
        total += gl.convert_layout(gl.sum(x[1] * y[1], 1), total.type.layout)
    return total


@gluon.jit
def row_sum(x):
    total = gl.sum(x[0], 1)
    if len(x) == 2:
        total += gl.convert_layout(gl.sum(x[1], 1), total.type.layout)
    return total


@gluon.jit
def affine_part(x, scale, offset, START: gl.constexpr, D: gl.constexpr):
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    y = x * gl.convert_layout(scale, layout)[:, None] + gl.convert_layout(offset, layout)[:, None]
    if START + x.shape[1] > D:
        inside = START + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout)) < D
        y = gl.where(inside[None, :], y, 0.0)
    return y


@gluon.jit
def affine_rows(x, scale, offset, D: gl.constexpr):
    """x[i, :] · scale[i] + offset[i] in the D true columns; columns past D stay zero."""
    first = affine_part(x[0], scale, offset, 0, D)
    if len(x) == 1:
        return (first,)
    else:
        return (first, affine_part(x[1], scale, offset, PART, D))


@gluon.jit
def load_vector(ptr, PRESENT: gl.constexpr, default, layouts, D: gl.constexpr, D2: gl.constexpr):
    """[D] float32 as parts; `default` everywhere when the vector is absent."""
    if PRESENT:
        cols = gl.arange(0, PART, gl.SliceLayout(0, layouts[0]))
        first = gl.load(ptr + cols, mask=cols < D, other=0.0).to(gl.float32)
    else:
        first = gl.full([PART], default, gl.float32, gl.SliceLayout(0, layouts[0]))
    if D2 == 0:
        return (first,)
    else:
        if PRESENT:
            cols_2 = PART + gl.arange(0, D2, gl.SliceLayout(0, layouts[1]))
            second = gl.load(ptr + cols_2, mask=cols_2 < D, other=0.0).to(gl.float32)
        else:
            second = gl.full([D2], default, gl.float32, gl.SliceLayout(0, layouts[1]))
        return (first, second)


@gluon.jit
def multiply(x, by):
    if len(x) == 1:
        return (x[0] * by[0],)
    else:
        return (x[0] * by[0], x[1] * by[1])


@gluon.jit
def scale_columns(x, by):
    if len(x) == 1:
        return (x[0] * by[0][None, :],)
    else:
        return (x[0] * by[0][None, :], x[1] * by[1][None, :])


@gluon.jit
def add_columns(x, by):
    if len(x) == 1:
        return (x[0] + by[0][None, :],)
    else:
        return (x[0] + by[0][None, :], x[1] + by[1][None, :])


@gluon.jit
def row_statistics(x, eps, NORM: gl.constexpr, D: gl.constexpr):
    """(r, −mean·r): x̂ = x·r − mean·r; see steps.py."""
    total = row_sum(x)
    mean = gl.zeros_like(total)
    if NORM == LAYER_NORM:
        mean = total / D
        x = affine_rows(x, mean * 0 + 1.0, -mean, D)
    square = row_dot(x, x)
    if NORM == L2:
        r = gl.sqrt(gl.to_tensor(D + 0.0)) / gl.maximum(gl.sqrt(square), eps)
    else:
        r = gl.rsqrt(square / D + eps)
    return r, -mean * r


@gluon.jit
def unit_rows_backward(grad, x_hat, r, factor, eps, NORM: gl.constexpr, D: gl.constexpr):
    """dx from dx̂ = factor·grad: r·(C dx̂ − x̂·mean(dx̂·x̂)), C the centring of layer_norm."""
    if NORM == NONE:
        return scale_all(grad, factor)
    else:
        along = row_dot(grad, x_hat) / D
        if NORM == L2:
            along = gl.where(r < gl.sqrt(gl.to_tensor(D + 0.0)) / eps, along, 0.0)  # below eps the size is a constant
        size = r * factor
        offset = gl.zeros_like(size)
        if NORM == LAYER_NORM:
            offset = row_sum(grad) * size * (-1.0 / D)
        if len(grad) == 1:
            return affine_rows((subtract_along(grad[0], x_hat[0], along),), size, offset, D)
        else:
            first, second = subtract_along(grad[0], x_hat[0], along), subtract_along(grad[1], x_hat[1], along)
            return affine_rows((first, second), size, offset, D)


@gluon.jit
def subtract_along(grad, x_hat, along):
    return grad - x_hat * gl.convert_layout(along, gl.SliceLayout(1, grad.type.layout))[:, None]


@gluon.jit
def scale_all(x, by):
    if len(x) == 1:
        return (x[0] * by,)
    else:
        return (x[0] * by, x[1] * by)


@gluon.jit
def score_gradient(p_mem, dp):
    """G of dP and of P in shared memory, in P's dtype."""
    p = widen(p_mem.load(dp.type.layout))
    return (p * (dp - gl.sum(p * dp, 1)[:, None])).to(p_mem.dtype)


@gluon.jit
def store_column_sums(ptr, x, factor, memory, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    """factor · sums over the rows of x of its first WIDTH columns, by way of a sum per warp in `memory`."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([num_warps, 1], [1, 32], [1, num_warps], [1, 0])
    scratch = reinterpret(memory, gl.float32, [num_warps, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scratch.store(gl.sum(gl.sum(gl.reshape(x, [ROWS // (16 * num_warps), num_warps, 16, COLUMNS]), 0), 1))
    cols = gl.arange(0, COLUMNS, gl.SliceLayout(0, wide))
    gl.store(ptr + cols, gl.sum(scratch.load(wide), 0) * factor, mask=cols < WIDTH)


@gluon.jit(do_not_specialize=["first_item", "tokens", "tokens_k"])
def hopper_backward_tile(
    q_1, k_1, v_1, dout_1, dq_1, dk_1, dv_1, q_2, k_2, v_2, dout_2, dq_2, dk_2, dv_2, lse_ptr, partials_ptr,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item, tokens, tokens_k,
    q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale,
    score_scale, softmax_scale, key_factor, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr,
    K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr,
    WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr, ON_DEVICE: gl.constexpr, SPLITS: gl.constexpr, BLOCK: gl.constexpr,
    USE_LSE: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    work = gl.program_id(0)
    if ON_DEVICE:
        first_item = gl.load(offsets_ptr + CLASS)
        if work >= (gl.load(offsets_ptr + CLASS + 1) - first_item) * H:
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
    load_rows(k_in, tiles, at_k, qk_full, k_start, k_length, h)
    load_rows(q_in, tiles, at_q, qk_full, q_start, q_length, h)
    mbarrier.expect(vo_full, 2 * TILE_BYTES)
    load_rows(v_in, tiles, at_v, vo_full, k_start, k_length, h)
    load_rows(dout_in, tiles, at_do, vo_full, q_start, q_length, h)
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
            lse = lse + (gl.load(pointers, mask=rows < q_length, other=float("inf")),)

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
        s = s + (start_dot_rows(q_mem, k_mem, zero_s, i * ROWS, ROWS),)
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
        dp = dp + (start_dot_rows(do_mem, v_mem, zero_s, i * ROWS, ROWS),)
    fence_async_shared()

    # ---- G and dV. Each G is a dep of the next wait, and a wait for what has long come stands before that: over neither
    # can the compiler move it
    dp_i = warpgroup_mma_wait((STEPS - 1) * PARTS, deps=[dp[0]])
    g_0 = score_gradient(scores.slice(0, ROWS), dp_i)
    if STEPS == 2:
        mbarrier.wait(vo_full, 0)
        dp_i, g_0 = warpgroup_mma_wait(0, deps=[dp[1], g_0])
        if EARLY:
            dv = start_dot_values(scores.permute([1, 0]), do_mem, zero_d)
        g_1 = score_gradient(scores.slice(ROWS, ROWS), dp_i)
    else:
        g_1 = g_0
    if STEPS == 1 or not EARLY:
        mbarrier.wait(vo_full, 0)
        g_0, g_1 = warpgroup_mma_wait(0, deps=[g_0, g_1])
        dv = start_dot_values(scores.permute([1, 0]), do_mem, zero_d)
    mbarrier.wait(vo_full, 0)
    dv_1, dv_2, g_0, g_1 = warpgroup_mma_wait(0, deps=[dv[0], dv[PARTS - 1], g_0, g_1])
    dv = column_parts(dv_1, dv_2, D2)
    scores.slice(0, ROWS).store(g_0)
    if STEPS == 2:
        scores.slice(ROWS, ROWS).store(g_1)
    fence_async_shared()

    # ---- a = Gᵀu and du; meanwhile dv leaves by v's tile, and q comes again into dout's
    a = start_dot_values(scores.permute([1, 0]), q_mem, zero_d)
    du = start_dot_values(scores, k_mem, zero_d)
    if NEEDS_Q:
        mbarrier.expect(q_full, TILE_BYTES)
        load_rows(q_in, tiles, at_do, q_full, q_start, q_length, h)
    write(v_mem, dv)
    store_rows(dv_out, tiles, at_v, k_start, k_length, h)

    if GAIN:  # loaded again: keeping it would cost registers
        k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
        gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2), k_weight)

    # ---- dk leaves by u's tile
    a = wait_for(a, PARTS)
    k_hat = read(k_mem, layouts)
    write(q_mem, unit_rows_backward(a, k_hat, k_r, key_factor, k_eps, K_NORM, D))
    store_rows(dk_out, tiles, at_q, k_start, k_length, h)

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
    store_rows(dq_out, tiles, at_k, q_start, q_length, h)
    if WEIGHT_GRADS:
        base = partials_ptr + ((item * SPLITS).to(gl.int64) * H + h) * (D * (1 + Q_BIAS))
        for c in gl.static_range(PARTS):
            store_column_sums(base + c * PART, du[c] * q_hat[c], softmax_scale, scores, D - c * PART, num_warps)
            if Q_BIAS:
                store_column_sums(base + D + c * PART, du[c], softmax_scale, scores, D - c * PART, num_warps)
    tma.store_wait(0)


def backward_tile(
    call: Any, index: int, dout: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, partials: Tensor, splits: int,
    weight_grads: bool, *, block: int, warps: int = 4, use_lse: bool = True, early: bool = True, registers: int | None = None,
) -> None:  # fmt: skip
    norms = call.norms
    first, second = parts(max(call.width, 64))
    tensors = dict(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq, dk=dk, dv=dv)
    descriptors = {f"{name}_1": ragged(x, block, first) for name, x in tensors.items()}
    descriptors |= {f"{name}_2": ragged(x, block, second) if second else None for name, x in tensors.items()}
    options = {} if registers is None else dict(maxnreg=registers)
    hopper_backward_tile[call.grid(index)](
        **descriptors, **call.weights(), **call.work(index), lse_ptr=lse, partials_ptr=partials, q_eps=norms.q_eps,
        k_eps=norms.k_eps, fold_scale=call.fold_scale, score_scale=call.score_scale, softmax_scale=call.softmax_scale,
        key_factor=call.key_factor, H=call.heads, D=call.width, D2=second, Q_NORM=norms.q_kind, K_NORM=norms.k_kind,
        FOLD=call.fold, WEIGHT_GRADS=weight_grads, SPLITS=splits, BLOCK=block, USE_LSE=use_lse, EARLY=early, num_warps=warps,
        **options,
    )  # fmt: skip
