"""Steps of Hopper's forward of long segments, in Gluon: u of raw query rows, and the softmax of a stream of keys.

A tile of rows is a tuple of one or two column parts; see hopper_steps.py.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .._jit import triton_version
from .hopper_steps import PART
from .hopper_tile_steps import (
    block_boundary,
    matrix,
    row_dot,
    row_sum,
    scale_columns,
    scale_rows,
    start_adding,
    start_dot_rows,
    thread_sums,
)
from .steps import L2, LAYER_NORM, NONE

ROUND_LATE = gl.constexpr(triton_version() < (3, 7))  # Triton 3.9's ptxas would serialize the products


@gluon.jit
def round_to(x, DTYPE: gl.constexpr):
    """x rounded to DTYPE, in float32; for bfloat16 in fewer instructions than the compiler takes."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(DTYPE).to(gl.float32)


@gluon.jit
def fold_part(
    x, r, offset, gain, shift, mean, START: gl.constexpr, GAIN: gl.constexpr, SHIFT: gl.constexpr, CENTRE: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    u = x * gl.convert_layout(r, layout)[:, None] + gl.convert_layout(offset, layout)[:, None]
    if CENTRE:
        add = -gl.convert_layout(mean, layout)[:, None]
        if SHIFT:
            add = add + shift[None, :]
        u = u * gain[None, :] + add if GAIN else u + add
    elif GAIN:
        u = u * gain[None, :] + shift[None, :] if SHIFT else u * gain[None, :]
    elif SHIFT:
        u = u + shift[None, :]
    if START + x.shape[1] > D:
        inside = START + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout)) < D
        u = gl.where(inside[None, :], u, 0.0)
    return u


@gluon.jit
def smallest(x, START: gl.constexpr, D: gl.constexpr):
    """Each row's smallest element before column D: its magnitude, but for the last bits, above the 7 of its column."""
    cols = START + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))[None, :]
    size = (x.to(gl.int32, bitcast=True) & 0x7FFFFF80) | cols
    if START + x.shape[1] > D:
        size = gl.where(cols < D, size, 0x7FFFFFFF)
    return gl.min(size, 1)


@gluon.jit
def take_out(x, residue, size, START: gl.constexpr):
    cols = START + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))[None, :]
    return gl.where(cols == (size & 0x7F)[:, None], x - residue[:, None], x)


@gluon.jit
def fold_rows(
    x, gain, shift, gain_sum, shift_sum, q_eps, fold_scale, Q_NORM: gl.constexpr, CENTRE: gl.constexpr,
    GAIN: gl.constexpr, SHIFT: gl.constexpr, DTYPE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """u of raw query rows, in float32, to be rounded to DTYPE; see steps.fold_query. shift comes times fold_scale.

    One sweep takes the sums of x, x² and x·gain, from which both means follow: x is 16-bit, so that nothing cancels
    in float32 that was there. A second sweep makes u.
    """
    total = row_sum(x)
    r, offset = gl.zeros_like(total) + fold_scale, gl.zeros_like(total)
    if Q_NORM != NONE:
        square = row_dot(x, x)
        if Q_NORM == LAYER_NORM:
            mean = total / D
            square = gl.maximum(square - mean * total, 0.0)
        if Q_NORM == L2:
            r = fold_scale * gl.sqrt(gl.to_tensor(D + 0.0)) / gl.maximum(gl.sqrt(square), q_eps)
        else:
            r = fold_scale * gl.rsqrt(square / D + q_eps)
        if Q_NORM == LAYER_NORM:
            offset = -mean * r
    u_mean = offset
    if CENTRE:
        u_mean = ((row_sum(scale_columns(x, gain)) if GAIN else total) * r + offset * gain_sum + shift_sum) * (1.0 / D)
    first = fold_part(x[0], r, offset, gain[0], shift[0], u_mean, 0, GAIN, SHIFT, CENTRE, D)
    if len(x) == 1:
        u = (round_to(first, DTYPE),)
    else:
        second = fold_part(x[1], r, offset, gain[1], shift[1], u_mean, PART, GAIN, SHIFT, CENTRE, D)
        u = (round_to(first, DTYPE), round_to(second, DTYPE))
    if CENTRE:
        residue = row_sum(u)
        FIRST: gl.constexpr = D if D >= PART else 32 if D >= 32 else 16  # columns of steps.py's first part
        if D == 2 * PART:
            size = gl.minimum(smallest(first, 0, D), smallest(second, PART, D))
            u = (take_out(u[0], residue, size, 0), take_out(u[1], residue, size, PART))
        elif len(x) == 1:
            u = (take_out(u[0], residue, smallest(first, 0, FIRST), 0),)
        else:
            u = (take_out(u[0], residue, smallest(first, 0, D), 0), u[1])
    return u


@gluon.jit
def vector_sum(x):
    return gl.sum(x[0], 0) if len(x) == 1 else gl.sum(x[0], 0) + gl.sum(x[1], 0)


@gluon.jit
def opaque_zero():
    """0, which the compiler does not know and does not compute ahead of its place."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def load_r(r_mem, stage, score_scale, layout: gl.constexpr, K_NORM: gl.constexpr, FOLD: gl.constexpr, N: gl.constexpr):
    """What the columns of the scores are multiplied by."""
    if K_NORM == NONE:
        return gl.full([N], 0.0, gl.float32, layout) + score_scale
    else:
        r = r_mem.index(stage).load(layout)
        return r if FOLD else r * score_scale


@gluon.jit
def softmax_step(s, r, m, l, valid, MASKED: gl.constexpr, FIXED: gl.constexpr, SCALED: gl.constexpr):
    """(P, m, l, what acc is to be multiplied by) after the scores of one more tile."""
    if SCALED:
        s = s * r[None, :]
    if MASKED:
        s = gl.where(valid[None, :], s, -float("inf"))
    rescale = m
    if not FIXED:
        m_new = gl.maximum(m, gl.max(s, 1))
        safe = gl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
        rescale = gl.exp2(m - safe)
        m = safe
        l = l * gl.convert_layout(rescale, gl.SliceLayout(1, l.type.layout))[:, None]
    p = gl.exp2(s - m[:, None])
    return p, m, l + thread_sums(p), rescale


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def stream_step(
    acc, p, m, l, u, zero, valid, k_mem, v_mem, r_mem, full, empty, stage, phase, score_scale, D2: gl.constexpr,
    K_NORM: gl.constexpr, FOLD: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """One stage: P of its keys, and acc with the P of the step before and its values."""
    PARTS: gl.constexpr = len(acc)
    ROWS: gl.constexpr = zero.shape[0]
    SCALED: gl.constexpr = K_NORM != NONE or not FOLD
    LATE: gl.constexpr = ROUND_LATE and D2 == 16
    mbarrier.wait(full.index(stage), phase)
    s = start_dot_rows(u, matrix(k_mem, stage, BLOCK_N, D2), zero, 0, ROWS)
    sums = start_adding(p, matrix(v_mem, stage, BLOCK_N, D2), acc)
    r = load_r(r_mem, stage, score_scale, gl.SliceLayout(0, zero.type.layout), K_NORM, FOLD, BLOCK_N)
    s = warpgroup_mma_wait(PARTS, deps=[s])
    p_next, m, l, rescale = softmax_step(s, r, m, l, valid, False, FIXED, SCALED)
    if not LATE:
        p_next = gl.convert_layout(p_next.to(p.dtype), p.type.layout)
    block_boundary()  # and P as a dep of the wait: the compiler moves P over neither
    if D2 == 0:
        acc_1, p, p_next = warpgroup_mma_wait(0, deps=[sums[0], p, p_next])
        acc = (acc_1,)
    else:
        acc_1, acc_2, p, p_next = warpgroup_mma_wait(0, deps=[sums[0], sums[1], p, p_next])
        acc = (acc_1, acc_2)
    if LATE:  # into the registers of the P before
        p_next = gl.convert_layout(p_next.to(p.dtype), p.type.layout)
    mbarrier.arrive(empty.index(stage))
    if not FIXED:
        acc = scale_rows(acc, rescale)
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, p_next, m, l, stage, phase
