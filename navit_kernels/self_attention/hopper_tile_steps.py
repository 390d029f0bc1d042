"""Steps that Hopper's attention kernels share, in Gluon: tiles of rows in shared memory and in registers.

A tile of rows is a tuple of one or two column parts; see hopper_steps.py. Norms are as in steps.py.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language._core import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_steps import PART, load_tile, segment_rows
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
def load_block(source, tiles, i, full, start, length, row, h):
    """The rows from `row` of a segment's head into tile i, by TMA."""
    for c in gl.static_range(len(tiles)):
        load_tile(source[c], segment_rows(start, length, row, h, c * PART), full, tiles[c].index(i))


@gluon.jit
def store_block(target, tiles, i, start, length, row, h):
    for c in gl.static_range(len(tiles)):
        store_tile(target[c], segment_rows(start, length, row, h, c * PART), tiles[c].index(i))


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
def operand(x, DTYPE: gl.constexpr, layout: gl.constexpr):
    """x, rounded, as a left operand of a product, in registers."""
    return gl.convert_layout(x.to(DTYPE), layout)


@gluon.jit
def operands(x, DTYPE: gl.constexpr, layout: gl.constexpr):
    if len(x) == 1:
        return (operand(x[0], DTYPE, layout),)
    else:
        return (operand(x[0], DTYPE, layout), operand(x[1], DTYPE, layout))


@gluon.jit
def from_operands(x, layouts):
    """Left operands in float32, where accumulators have them."""
    first = widen(gl.convert_layout(x[0], layouts[0]))
    if len(x) == 1:
        return (first,)
    else:
        return (first, widen(gl.convert_layout(x[1], layouts[1])))


@gluon.jit
def block_boundary():
    """A branch that is never taken: the compiler moves no wait over it."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; mov.b32 $0, $1; LOOP: activemask.b32 $0; setp.eq.u32 p, $0, 0; @p bra LOOP; }",
        "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
def start_scores(x, y, zero):
    """x · yᵀ, all rows of x."""
    product = warpgroup_mma(x[0], y[0].permute([1, 0]), zero, use_acc=False, is_async=True)
    if len(x) == 2:
        product = warpgroup_mma(x[1], y[1].permute([1, 0]), product, is_async=True)
    return product


@gluon.jit
def start_adding(p, y, acc):
    """acc + p · y, p in registers."""
    first = warpgroup_mma(p, y[0], acc[0], is_async=True)
    if len(y) == 1:
        return (first,)
    else:
        p_2 = gl.convert_layout(p, gl.DotOperandLayout(0, acc[1].type.layout, 2))
        return (first, warpgroup_mma(p_2, y[1], acc[1], is_async=True))


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
def scale_rows(x, by):
    """x[i, :] · by[i]."""
    first = x[0] * gl.convert_layout(by, gl.SliceLayout(1, x[0].type.layout))[:, None]
    if len(x) == 1:
        return (first,)
    else:
        return (first, x[1] * gl.convert_layout(by, gl.SliceLayout(1, x[1].type.layout))[:, None])


@gluon.jit
def thread_sums(p):
    """Sums over the columns of p that differ by multiples of 8: those that one thread has."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def scale_all(x, by):
    if len(x) == 1:
        return (x[0] * by,)
    else:
        return (x[0] * by, x[1] * by)


@gluon.jit
def store_column_sums(ptr, x, factor, memory, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    """factor · sums over the rows of x of its first WIDTH columns."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    sums = gl.sum(gl.sum(gl.reshape(x, [ROWS // (16 * num_warps), num_warps, 16, COLUMNS]), 0), 1)
    store_warp_sums(ptr, sums, factor, memory, WIDTH, num_warps)


@gluon.jit
def store_warp_sums(ptr, sums, factor, memory, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    """factor · sums over the warps, a row each, by way of `memory`."""
    COLUMNS: gl.constexpr = sums.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([num_warps, 1], [1, 32], [1, num_warps], [1, 0])
    NUMBERS: gl.constexpr = memory.numel * memory.dtype.primitive_bitwidth // 32
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scratch = reinterpret(memory, gl.float32, [NUMBERS // COLUMNS, COLUMNS], layout).slice(0, num_warps)
    scratch.store(sums)
    cols = gl.arange(0, COLUMNS, gl.SliceLayout(0, wide))
    gl.store(ptr + cols, gl.sum(scratch.load(wide), 0) * factor, mask=cols < WIDTH)
