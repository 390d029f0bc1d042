"""Steps of Hopper's backward of segments up to 256 tokens, in Gluon: blocks of rows as operands in registers.

A tile of rows is a tuple of one or two column parts; see hopper_steps.py. Norms are as in steps.py.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .hopper_tile_steps import (
    add_columns,
    affine_rows,
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
