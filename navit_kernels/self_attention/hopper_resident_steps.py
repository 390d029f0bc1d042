"""Steps of Hopper's backward of segments up to 256 tokens, in Gluon: blocks of rows as operands in registers.

A tile of rows is a tuple of one or two column parts; see hopper_steps.py. Norms are as in steps.py.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .hopper_tile_steps import (
    add_columns,
    affine_rows,
    reinterpret,
    row_statistics,
    scale_all,
    scale_columns,
    widen,
)
from .steps import NONE

ROWS = gl.constexpr(64)  # of a block


@gluon.jit
def load_raw(x, layouts):
    """Parts of a matrix in shared memory, not widened."""
    if len(x) == 1:
        return (x[0].load(layouts[0]),)
    else:
        return (x[0].load(layouts[0]), x[1].load(layouts[1]))


@gluon.jit
def widen_all(x):
    if len(x) == 1:
        return (widen(x[0]),)
    else:
        return (widen(x[0]), widen(x[1]))


@gluon.jit
def operand(x, DTYPE: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(x.to(DTYPE), layout)


@gluon.jit
def operands(x, DTYPE: gl.constexpr, layout: gl.constexpr):
    """Parts as left operands of a product, in registers."""
    if len(x) == 1:
        return (operand(x[0], DTYPE, layout),)
    else:
        return (operand(x[0], DTYPE, layout), operand(x[1], DTYPE, layout))


@gluon.jit
def from_operands(x, layouts):
    if len(x) == 1:
        return (widen(gl.convert_layout(x[0], layouts[0])),)
    else:
        return (widen(gl.convert_layout(x[0], layouts[0])), widen(gl.convert_layout(x[1], layouts[1])))


@gluon.jit
def delta_rows(dout, out):
    """rowsum(dO ⊙ O) of one part."""
    return gl.sum(widen(dout) * widen(out), 1)


@gluon.jit
def sums_by_thread(x, num_warps: gl.constexpr):
    """Sums over each thread's two rows."""
    return gl.sum(gl.reshape(x, [num_warps, 2, 8, x.shape[1]]), 1)


@gluon.jit
def share_vector(x, memory, at):
    for c in gl.static_range(len(x)):
        memory[c].index(at).store(x[c])


@gluon.jit
def shared_vector(memory, at, layouts):
    first = memory[0].index(at).load(gl.SliceLayout(0, layouts[0]))
    if len(memory) == 1:
        return (first,)
    else:
        return (first, memory[1].index(at).load(gl.SliceLayout(0, layouts[1])))


@gluon.jit
def store_sums(ptr, sums, factor, memory, WIDTH: gl.constexpr, num_warps: gl.constexpr):
    COLUMNS: gl.constexpr = sums.shape[2]
    wide: gl.constexpr = gl.BlockedLayout([num_warps, 1], [1, 32], [1, num_warps], [1, 0])
    scratch = reinterpret(memory, gl.float32, [num_warps, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scratch.store(gl.sum(sums, 1))
    cols = gl.arange(0, COLUMNS, gl.SliceLayout(0, wide))
    gl.store(ptr + cols, gl.sum(scratch.load(wide), 0) * factor, mask=cols < WIDTH)


@gluon.jit
def fold(q, vectors, layouts, q_eps, fold_scale, Q_NORM: gl.constexpr, FOLD: gl.constexpr, GAIN: gl.constexpr,
         Q_BIAS: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """(u, r, −mean·r) of rows of q."""
    if Q_NORM != NONE:
        r, offset = row_statistics(q, q_eps, Q_NORM, D)
        u = affine_rows(q, r * fold_scale, offset * fold_scale, D)
    else:
        r = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, q[0].type.layout))
        offset = gl.zeros_like(r)
        u = q
        if FOLD:
            u = scale_all(q, fold_scale)
    if GAIN:
        u = scale_columns(u, shared_vector(vectors, 0, layouts))
    if Q_BIAS:
        u = add_columns(u, scale_all(shared_vector(vectors, 1, layouts), fold_scale))
    return u, r, offset
