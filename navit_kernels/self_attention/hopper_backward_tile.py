"""Varlen attention, backward of short segments on Hopper. The maths stands in kernel.py.

T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools

import torch
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
def load_item(items_ptr, item, tokens, tokens_k):
    """(q_start, q_length, k_start, k_length) of a work item; see plan.py."""
    base = items_ptr + item * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    return (
        q_start,
        gl.minimum(gl.load(base + 1), tokens - q_start),
        k_start,
        gl.minimum(gl.load(base + 3), tokens_k - k_start),
    )


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
def read(x, layouts):
    """Float32 parts of a matrix in shared memory."""
    first = x[0].load(layouts[0]).to(gl.float32)
    if len(x) == 1:
        return (first,)
    else:
        return (first, x[1].load(layouts[1]).to(gl.float32))


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
def along_rows(x, vector):
    """[ROWS] as a column beside x."""
    return gl.convert_layout(vector, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def subtract_rows(x, mean, D: gl.constexpr):
    """x[i, :] − mean[i] in the D true columns; columns past D stay zero."""
    first = x[0] - along_rows(x[0], mean)
    if len(x) == 1:
        return (first,)
    else:
        inside = PART + gl.arange(0, x[1].shape[1], gl.SliceLayout(0, x[1].type.layout)) < D
        return (first, gl.where(inside[None, :], x[1] - along_rows(x[1], mean), 0.0))


@gluon.jit
def scale_rows(x, by):
    first = x[0] * along_rows(x[0], by)
    if len(x) == 1:
        return (first,)
    else:
        return (first, x[1] * along_rows(x[1], by))


@gluon.jit
def scale_all(x, by):
    if len(x) == 1:
        return (x[0] * by,)
    else:
        return (x[0] * by, x[1] * by)


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
    """(mean, r): x̂ = (x − mean)·r; see steps.py."""
    mean = row_sum(x) / D
    if NORM == LAYER_NORM:
        x = subtract_rows(x, mean, D)
    square = row_dot(x, x)
    if NORM == L2:
        return mean, gl.sqrt(gl.to_tensor(D + 0.0)) / gl.maximum(gl.sqrt(square), eps)
    else:
        return mean, 1.0 / gl.sqrt(square / D + eps)


@gluon.jit
def unit_rows(x, mean, r, NORM: gl.constexpr, D: gl.constexpr):
    """x̂."""
    if NORM == LAYER_NORM:
        x = subtract_rows(x, mean, D)
    if NORM == NONE:
        return x
    else:
        return scale_rows(x, r)


@gluon.jit
def unit_rows_backward(grad, x_hat, r, eps, NORM: gl.constexpr, D: gl.constexpr):
    """dx from dx̂: r·(C dx̂ − x̂·mean(dx̂·x̂)), C the centring of layer_norm."""
    if NORM == NONE:
        return grad
    else:
        along = row_dot(grad, x_hat) / D
        if NORM == L2:
            along = gl.where(r < gl.sqrt(gl.to_tensor(D + 0.0)) / eps, along, 0.0)  # below eps the size is a constant
        if NORM == LAYER_NORM:
            grad = subtract_rows(grad, row_sum(grad) / D, D)
        x_hat = scale_rows(x_hat, along)
        if len(grad) == 1:
            return scale_rows((grad[0] - x_hat[0],), r)
        else:
            return scale_rows((grad[0] - x_hat[0], grad[1] - x_hat[1]), r)


@gluon.jit
def store_column_sums(ptr, x, memory, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    """Sums over the rows of x of its first WIDTH columns, by way of a sum per warp in `memory`."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([num_warps, 1], [1, 32], [1, num_warps], [1, 0])
    scratch = reinterpret(memory, gl.float32, [num_warps, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scratch.store(gl.sum(gl.sum(gl.reshape(x, [ROWS // (16 * num_warps), num_warps, 16, COLUMNS]), 2), 0))
    cols = gl.arange(0, COLUMNS, gl.SliceLayout(0, wide))
    gl.store(ptr + cols, gl.sum(scratch.load(wide), 0), mask=cols < WIDTH)


@gluon.jit(do_not_specialize=["first_item", "count", "tokens", "tokens_k"])
def hopper_backward_tile(
    q_1, k_1, v_1, dout_1, dq_1, dk_1, dv_1, q_2, k_2, v_2, dout_2, dq_2, dk_2, dv_2, partials_ptr, q_weight_ptr,
    q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item, count, tokens, tokens_k,
    q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale,
    score_scale, softmax_scale, key_factor, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr,
    K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr,
    WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr, ON_DEVICE: gl.constexpr, SPLITS: gl.constexpr, BLOCK: gl.constexpr,
    ROWS: gl.constexpr, OPAQUE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    if ON_DEVICE:
        first_item = gl.load(offsets_ptr + CLASS)
        count = (gl.load(offsets_ptr + CLASS + 1) - first_item) * H
    DTYPE: gl.constexpr = q_1.dtype
    PARTS: gl.constexpr = 2 if D2 else 1
    TILE_BYTES: gl.constexpr = BLOCK * (PART + D2) * 2
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
    zero_s = gl.zeros([ROWS, BLOCK], gl.float32, mma_s)
    zero_1 = gl.zeros([BLOCK, PART], gl.float32, mma_1)
    zero_d = column_parts(zero_1, zero_1 if D2 == 0 else gl.zeros([BLOCK, D2 or 16], gl.float32, mma_2), D2)

    tiles_1 = gl.allocate_shared_memory(DTYPE, [5, 1, 1, 1, BLOCK, PART], q_1.layout)
    if D2 == 0:
        tiles = (tiles_1,)
    else:
        tiles = (tiles_1, gl.allocate_shared_memory(DTYPE, [5, 1, 1, 1, BLOCK, D2], q_2.layout))
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], DTYPE)
    all_scores = gl.allocate_shared_memory(DTYPE, [1, BLOCK, BLOCK], SCORES)
    qk_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    vo_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qk_full, count=1)
    mbarrier.init(vo_full, count=1)
    mbarrier.init(q_full, count=1)
    fence_async_shared()

    work = gl.program_id(0)
    if work < count:
        q_start, q_length, k_start, k_length = load_item(items_ptr, first_item + work // H, tokens, tokens_k)
        mbarrier.expect(qk_full, 2 * TILE_BYTES)
        load_rows(q_in, tiles, 0, qk_full, q_start, q_length, work % H)
        load_rows(k_in, tiles, 1, qk_full, k_start, k_length, work % H)
    phase = 0
    for work in range(gl.program_id(0), count, gl.num_programs(0)):
        h = work % H
        item = first_item + work // H
        q_start, q_length, k_start, k_length = load_item(items_ptr, item, tokens, tokens_k)
        at_q, at_k, at_v, at_do, at_x = 2 * phase, 2 * phase + 1, 2 - 2 * phase, 3 - 2 * phase, 4
        q_mem, k_mem = matrix(tiles, at_q, BLOCK, D2), matrix(tiles, at_k, BLOCK, D2)
        v_mem, do_mem = matrix(tiles, at_v, BLOCK, D2), matrix(tiles, at_do, BLOCK, D2)
        if OPAQUE:
            scores = all_scores.index(
                gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
            )
        else:
            scores = all_scores.index(0)

        # ---- u and k̂ in place
        mbarrier.wait(qk_full, phase)
        tma.store_wait(0)
        mbarrier.expect(vo_full, 2 * TILE_BYTES)
        load_rows(v_in, tiles, at_v, vo_full, k_start, k_length, h)
        load_rows(dout_in, tiles, at_do, vo_full, q_start, q_length, h)
        k = read(k_mem, layouts)
        k_mean, k_r = row_statistics(k, k_eps, K_NORM, D)
        if K_NORM != NONE:
            write(k_mem, unit_rows(k, k_mean, k_r, K_NORM, D))
        q = read(q_mem, layouts)
        q_mean, q_r = row_statistics(q, q_eps, Q_NORM, D)
        if FOLD:
            k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
            q_weight = load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2)
            u = unit_rows(q, q_mean, q_r, Q_NORM, D)
            if GAIN:
                u = scale_columns(u, multiply(q_weight, k_weight))
            if Q_BIAS:
                q_bias = load_vector(q_bias_ptr + h * q_bias_stride, Q_BIAS, 0.0, layouts, D, D2)
                u = add_columns(u, multiply(q_bias, k_weight))
            write(q_mem, scale_all(u, fold_scale))

        # ---- P
        s = ()
        for i in gl.static_range(STEPS):
            s = s + (start_dot_rows(q_mem, k_mem, zero_s, i * ROWS, ROWS),)
        for i in gl.static_range(STEPS):
            s_i = warpgroup_mma_wait((STEPS - 1 - i) * PARTS, deps=[s[i]])
            if not FOLD:
                s_i = s_i * score_scale
            s_i = gl.where((gl.arange(0, BLOCK, col_s) < k_length)[None, :], s_i, -float("inf"))
            m = gl.where(k_length > 0, gl.max(s_i, 1), 0.0)
            p = gl.exp2(s_i - m[:, None])
            l = gl.sum(p, 1)
            p = p * gl.where(l == 0, 0.0, 1.0 / l)[:, None]
            scores.slice(i * ROWS, ROWS).store(p.to(DTYPE))
        fence_async_shared()

        # ---- dV and G
        mbarrier.wait(vo_full, phase)
        dp = ()
        for i in gl.static_range(STEPS):
            dp = dp + (start_dot_rows(do_mem, v_mem, zero_s, i * ROWS, ROWS),)
        g = ()
        for i in gl.static_range(STEPS):
            if i == STEPS - 1:
                dv = start_dot_values(scores.permute([1, 0]), do_mem, zero_d)
            dp_i = warpgroup_mma_wait((STEPS - 1 - i + (i == STEPS - 1)) * PARTS, deps=[dp[i]])
            p = scores.slice(i * ROWS, ROWS).load(mma_s).to(gl.float32)
            g = g + ((p * (dp_i - gl.sum(p * dp_i, 1)[:, None])).to(DTYPE),)
        dv = wait_for(dv, 0)
        for i in gl.static_range(STEPS):
            scores.slice(i * ROWS, ROWS).store(g[i])
        fence_async_shared()
        later = work + gl.num_programs(0)
        if later < count:
            n_start, n_length, m_start, m_length = load_item(items_ptr, first_item + later // H, tokens, tokens_k)
            mbarrier.expect(qk_full, 2 * TILE_BYTES)
            load_rows(q_in, tiles, at_v, qk_full, n_start, n_length, later % H)
            load_rows(k_in, tiles, at_do, qk_full, m_start, m_length, later % H)

        # ---- du and Gᵀu
        du = start_dot_values(scores, k_mem, zero_d)
        a = start_dot_values(scores.permute([1, 0]), q_mem, zero_d)
        write(matrix(tiles, at_x, BLOCK, D2), dv)
        store_rows(dv_out, tiles, at_x, k_start, k_length, h)
        du, a = wait_for(du, PARTS), wait_for(a, 0)
        if NEEDS_Q:
            tma.store_wait(0)
            mbarrier.expect(q_full, TILE_BYTES)
            load_rows(q_in, tiles, at_x, q_full, q_start, q_length, h)
        k_hat = read(k_mem, layouts)
        write(k_mem, unit_rows_backward(scale_all(a, key_factor), k_hat, k_r, k_eps, K_NORM, D))
        store_rows(dk_out, tiles, at_k, k_start, k_length, h)
        dt = scale_all(du, softmax_scale)
        dq_hat = dt
        if GAIN:
            k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
            q_weight = load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2)
            dq_hat = scale_columns(dt, multiply(q_weight, k_weight))
        if NEEDS_Q:
            mbarrier.wait(q_full, phase)
            q_hat = unit_rows(read(matrix(tiles, at_x, BLOCK, D2), layouts), q_mean, q_r, Q_NORM, D)
            write(q_mem, unit_rows_backward(dq_hat, q_hat, q_r, q_eps, Q_NORM, D))
        else:
            write(q_mem, dq_hat)
        store_rows(dq_out, tiles, at_q, q_start, q_length, h)
        if WEIGHT_GRADS:
            base = partials_ptr + ((item * SPLITS).to(gl.int64) * H + h) * (D * (1 + Q_BIAS))
            for c in gl.static_range(PARTS):
                store_column_sums(base + c * PART, dt[c] * q_hat[c], scores, D - c * PART, num_warps)
                if Q_BIAS:
                    store_column_sums(base + D + c * PART, dt[c], scores, D - c * PART, num_warps)
        phase = phase ^ 1
    tma.store_wait(0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def backward_tile(
    call, index: int, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, partials: Tensor, splits: int,
    weight_grads: bool, *, block: int, warps: int = 4, rows: int | None = None, resident: int = 2, opaque: bool = True,
    registers: int | None = None,
) -> None:  # fmt: skip
    norms = call.norms
    first, second = parts(call.width)
    tensors = dict(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq, dk=dk, dv=dv)
    descriptors = {f"{name}_1": ragged(x, block, first) for name, x in tensors.items()}
    descriptors |= {f"{name}_2": ragged(x, block, second) if second else None for name, x in tensors.items()}
    (count,) = call.grid(index)
    programs = min(count, resident * multiprocessors(call.q.device))
    options = {} if registers is None else dict(maxnreg=registers)
    hopper_backward_tile[(programs,)](
        **descriptors, **call.weights(), **call.work(index), partials_ptr=partials, count=count, q_eps=norms.q_eps,
        k_eps=norms.k_eps, fold_scale=call.fold_scale, score_scale=call.score_scale, softmax_scale=call.softmax_scale,
        key_factor=call.key_factor, H=call.heads, D=call.width, D2=second, Q_NORM=norms.q_kind, K_NORM=norms.k_kind,
        FOLD=call.fold, WEIGHT_GRADS=weight_grads, SPLITS=splits, BLOCK=block, ROWS=rows or 16 * warps, OPAQUE=opaque,
        num_warps=warps, **options,
    )  # fmt: skip
