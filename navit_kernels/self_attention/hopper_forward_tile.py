"""Varlen attention, forward of short segments on Hopper, in Gluon. The maths stands in kernel.py.

A program owns one head of a whole segment, as forward_tile does, and reads everything once. All rows come and go by
TMA, the products are asynchronous, and two programs or more share a multiprocessor: one's products run under another's
softmax. K is normalized in place, in shared memory; a block of query rows is folded in registers and multiplied from
there, so that its output may leave by its tile:

    tile    holds
    K, V    k, then k̂; v: all keys
    Q       a block of rows each: q, then out

    for each block of rows:  u → S = u·k̂ᵀ, in chunks of keys → P → out = P·v

A chunk's scores are computed under the softmax of the chunk before. A fixed maximum serves all rows of a head where its
weights bound the scores: √D·‖u_i‖ ≤ √D·fold_scale·(√D·max|γq γk| + ‖βq γk‖) ≤ FIXED_MAX_LIMIT. Else all scores of a
block stand in registers, and their maximum is known before the first exponential.

Barriers: k_full, v_full and one of q_full per block, each of one arrival and one phase, say that TMA's rows are there.
Rows past the segment's end are loaded as zeros and not stored (see hopper_steps.py).

T tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_steps import PART, load_tile, parts, ragged, segment_rows
from .hopper_tile_steps import (
    add_columns,
    affine_rows,
    column_parts,
    load_rows,
    load_vector,
    matrix,
    multiply,
    read,
    row_statistics,
    scale_all,
    scale_columns,
    store_tile,
    write,
)
from .kernel import FIXED_MAX_LIMIT
from .steps import NONE


@gluon.jit
def rows_of(x, START: gl.constexpr, ROWS: gl.constexpr):
    if len(x) == 1:
        return (x[0].slice(START, ROWS),)
    else:
        return (x[0].slice(START, ROWS), x[1].slice(START, ROWS))


@gluon.jit
def normalize_rows(x, eps, layouts, NORM: gl.constexpr, D: gl.constexpr):
    """A matrix in shared memory becomes x̂, in place."""
    values = read(x, layouts)
    r, offset = row_statistics(values, eps, NORM, D)
    write(x, affine_rows(values, r, offset, D))


@gluon.jit
def folded_rows(
    q, gain, shift, q_eps, fold_scale, Q_NORM: gl.constexpr, FOLD: gl.constexpr, GAIN: gl.constexpr,
    SHIFT: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """u in float32; q itself where nothing is folded in."""
    u = q
    if Q_NORM != NONE:
        r, offset = row_statistics(q, q_eps, Q_NORM, D)
        u = affine_rows(q, r * fold_scale, offset * fold_scale, D)
    elif FOLD:
        u = scale_all(q, fold_scale)
    if GAIN:
        u = scale_columns(u, gain)
    if SHIFT:
        u = add_columns(u, scale_all(shift, fold_scale))
    return u


@gluon.jit
def operand(x, dtype: gl.constexpr, mma: gl.constexpr):
    """x, rounded, as a left operand in registers."""
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    first = gl.convert_layout(x[0].to(dtype), layout)
    if len(x) == 1:
        return (first,)
    else:
        return (first, gl.convert_layout(x[1].to(dtype), layout))


@gluon.jit
def start_scores(u, k, START: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr):
    """u · k̂ᵀ of the keys from START."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COLUMNS, 16])
    keys = rows_of(k, START, COLUMNS)
    u = operand(u, k[0].dtype, mma)
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    s = warpgroup_mma(u[0], keys[0].permute([1, 0]), zero, use_acc=False, is_async=True)
    if len(k) == 2:
        s = warpgroup_mma(u[1], keys[1].permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def start_output(p, v, acc, ADD: gl.constexpr):
    """acc + p · v; without ADD, p · v."""
    first = warpgroup_mma(p, v[0], acc[0], use_acc=ADD, is_async=True)
    if len(v) == 1:
        return (first,)
    else:
        return (first, warpgroup_mma(p, v[1], acc[1], use_acc=ADD, is_async=True))


@gluon.jit
def wait_for_output(acc, p, other, LATER: gl.constexpr):
    """(acc, p, other) once P has been multiplied and at most LATER others are under way."""
    if len(acc) == 1:
        first, p, other = warpgroup_mma_wait(LATER, deps=[acc[0], p, other])
        return (first,), p, other
    else:
        first, second, p, other = warpgroup_mma_wait(LATER, deps=[acc[0], acc[1], p, other])
        return (first, second), p, other


@gluon.jit
def masked(s, START: gl.constexpr, k_length, COLUMNS: gl.constexpr):
    """Scores of the keys from START, −inf past the last one."""
    if START + COLUMNS > k_length:
        keys = START + gl.arange(0, COLUMNS, gl.SliceLayout(0, s.type.layout))
        s = gl.where((keys < k_length)[None, :], s, -float("inf"))
    return s


@gluon.jit
def attend_fixed(
    u, k, v, zero, m, k_length, v_full, KEYS: gl.constexpr, CHUNK: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """(acc, l, m) of a block of rows, whose scores are at most m."""
    ROWS: gl.constexpr = u[0].shape[0]
    PARTS: gl.constexpr = len(u)
    CHUNKS: gl.constexpr = (KEYS + CHUNK - 1) // CHUNK
    mma_1: gl.constexpr = zero[0].type.layout
    acc = zero
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, mma_1))
    started = start_scores(u, k, 0, min(CHUNK, KEYS), ROWS, num_warps)
    for c in gl.static_range(CHUNKS):
        s = started
        if c < CHUNKS - 1:
            started = start_scores(u, k, (c + 1) * CHUNK, min(CHUNK, KEYS - (c + 1) * CHUNK), ROWS, num_warps)
        s = warpgroup_mma_wait(PARTS * (c < CHUNKS - 1) + PARTS * (c > 0), deps=[s])
        s = masked(s, c * CHUNK, k_length, min(CHUNK, KEYS - c * CHUNK))
        p = gl.exp2(s - m)
        l += gl.convert_layout(gl.sum(p, 1), gl.SliceLayout(1, mma_1))
        p_16 = operand((p,), v[0].dtype, mma_1)[0]
        # P is a dep of the wait, and a wait for what has long come stands before it: the compiler moves P over neither
        mbarrier.wait(v_full, 0)
        if c > 0:
            acc, before, p_16 = wait_for_output(acc, before, p_16, PARTS * (c < CHUNKS - 1))
        acc = start_output(p_16, rows_of(v, c * CHUNK, min(CHUNK, KEYS - c * CHUNK)), acc, c > 0)
        before = p_16
    acc, before, l = wait_for_output(acc, before, l, 0)
    return acc, l, gl.zeros_like(l) + m


@gluon.jit
def attend(
    u, k, v, zero, score_scale, k_length, v_full, FOLD: gl.constexpr, KEYS: gl.constexpr, CHUNK: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """(acc, l, m) of a block of rows, m the true maximum."""
    ROWS: gl.constexpr = u[0].shape[0]
    PARTS: gl.constexpr = len(u)
    CHUNKS: gl.constexpr = (KEYS + CHUNK - 1) // CHUNK
    mma_1: gl.constexpr = zero[0].type.layout
    row: gl.constexpr = gl.SliceLayout(1, mma_1)
    started = ()
    for c in gl.static_range(CHUNKS):
        started = started + (  # noqa: RUF005
            start_scores(u, k, c * CHUNK, min(CHUNK, KEYS - c * CHUNK), ROWS, num_warps),
        )
    m = gl.full([ROWS], -float("inf"), gl.float32, row)
    scores = ()
    for c in gl.static_range(CHUNKS):
        s = warpgroup_mma_wait((CHUNKS - 1 - c) * PARTS, deps=[started[c]])
        if not FOLD:
            s = s * score_scale
        s = masked(s, c * CHUNK, k_length, min(CHUNK, KEYS - c * CHUNK))
        m = gl.maximum(m, gl.convert_layout(gl.max(s, 1), row))
        scores = scores + (s,)  # noqa: RUF005
    m = gl.where(k_length > 0, m, 0.0)
    l = gl.zeros([ROWS], gl.float32, row)
    acc = zero
    mbarrier.wait(v_full, 0)
    for c in gl.static_range(CHUNKS):
        p = gl.exp2(scores[c] - gl.convert_layout(m, gl.SliceLayout(1, scores[c].type.layout))[:, None])
        l += gl.convert_layout(gl.sum(p, 1), row)
        p_16 = operand((p,), v[0].dtype, mma_1)[0]
        acc = start_output(p_16, rows_of(v, c * CHUNK, min(CHUNK, KEYS - c * CHUNK)), acc, c > 0)
        acc, p_16, l = wait_for_output(acc, p_16, l, 0)
    return acc, l, m


@gluon.jit
def store_block(
    acc, l, m, q_tiles, out, lse_ptr, i, q_start, q_length, h, tokens, ROWS: gl.constexpr, D2: gl.constexpr,
    SAVE_LSE: gl.constexpr,
):  # fmt: skip
    """A block's output leaves by its tile, as does its lse."""
    row: gl.constexpr = gl.SliceLayout(1, acc[0].type.layout)
    inverse = gl.where(l == 0, 0.0, 1.0 / l)
    scaled = (acc[0] * inverse[:, None],)
    if D2 > 0:
        scaled = (
            scaled[0], acc[1] * gl.convert_layout(inverse, gl.SliceLayout(1, acc[1].type.layout))[:, None],
        )  # fmt: skip
    write(matrix(q_tiles, i, ROWS, D2), scaled)
    for c in gl.static_range(len(q_tiles)):
        store_tile(out[c], segment_rows(q_start, q_length, i * ROWS, h, c * PART), q_tiles[c].index(i))
    if SAVE_LSE:
        rows = i * ROWS + gl.arange(0, ROWS, row)
        gl.store(lse_ptr + h.to(gl.int64) * tokens + q_start + rows, m + gl.log2(l), mask=rows < q_length)


@gluon.jit(do_not_specialize=["first_item", "tokens", "tokens_k"])
def hopper_forward_tile(
    q_1, k_1, v_1, out_1, q_2, k_2, v_2, out_2, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr,
    offsets_ptr, first_item, tokens, tokens_k, q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr,
    k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale, score_scale, H: gl.constexpr, D: gl.constexpr,
    D2: gl.constexpr, Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr,
    K_WEIGHT: gl.constexpr, FOLD: gl.constexpr, SAVE_LSE: gl.constexpr, CLASS: gl.constexpr, ON_DEVICE: gl.constexpr,
    BLOCK: gl.constexpr, CHUNK: gl.constexpr, TRY_FIXED_MAX: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    work = gl.program_id(0)
    if ON_DEVICE:
        first_item = gl.load(offsets_ptr + CLASS)
        if work >= (gl.load(offsets_ptr + CLASS + 1) - first_item) * H:
            return
    DTYPE: gl.constexpr = q_1.dtype
    ROWS: gl.constexpr = 16 * num_warps
    BLOCKS: gl.constexpr = BLOCK // ROWS
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    HALF: gl.constexpr = BLOCK // 2
    q_in, k_in, v_in = column_parts(q_1, q_2, D2), column_parts(k_1, k_2, D2), column_parts(v_1, v_2, D2)
    out = column_parts(out_1, out_2, D2)
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D2 or 16, 16])
    layouts: gl.constexpr = (mma_1, mma_2)

    kv_1 = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, BLOCK, PART], k_1.layout)
    q_tiles_1 = gl.allocate_shared_memory(DTYPE, [BLOCKS, 1, 1, 1, ROWS, PART], q_1.layout)
    if D2 == 0:
        kv_tiles = (kv_1,)
        q_tiles = (q_tiles_1,)
    else:
        kv_tiles = (kv_1, gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, BLOCK, D2], k_2.layout))
        q_tiles = (q_tiles_1, gl.allocate_shared_memory(DTYPE, [BLOCKS, 1, 1, 1, ROWS, D2], q_2.layout))
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(BLOCKS):
        mbarrier.init(q_full.index(i), count=1)
    fence_async_shared()

    h = work % H
    base = items_ptr + (first_item + work // H) * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    mbarrier.expect(k_full, BLOCK * (PART + D2) * 2)
    load_rows(k_in, kv_tiles, 0, k_full, k_start, k_length, h)
    for i in gl.static_range(BLOCKS):
        if i * ROWS < q_length:
            mbarrier.expect(q_full.index(i), ROWS * (PART + D2) * 2)
            for c in gl.static_range(len(q_tiles)):
                rows = segment_rows(q_start, q_length, i * ROWS, h, c * PART)
                load_tile(q_in[c], rows, q_full.index(i), q_tiles[c].index(i))
    mbarrier.expect(v_full, BLOCK * (PART + D2) * 2)
    load_rows(v_in, kv_tiles, 1, v_full, k_start, k_length, h)
    k, v = matrix(kv_tiles, 0, BLOCK, D2), matrix(kv_tiles, 1, BLOCK, D2)

    k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
    gain = multiply(load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2), k_weight)
    shift = multiply(load_vector(q_bias_ptr + h * q_bias_stride, Q_BIAS, 0.0, layouts, D, D2), k_weight)
    largest = gl.max(gl.abs(gain[0]), 0)
    square = gl.sum(shift[0] * shift[0], 0)
    if D2 > 0:
        largest = gl.maximum(largest, gl.max(gl.abs(gain[1]), 0))
        square += gl.sum(shift[1] * shift[1], 0)
    root = gl.sqrt(gl.to_tensor(D + 0.0))
    bound = gl.abs(fold_scale) * root * (root * largest + gl.sqrt(square))

    fixed_max = False
    if TRY_FIXED_MAX:
        fixed_max = bound <= FIXED_MAX_LIMIT

    mbarrier.wait(k_full, 0)
    if K_NORM != NONE:
        normalize_rows(rows_of(k, 0, HALF), k_eps, layouts, K_NORM, D)
        if k_length > HALF:
            normalize_rows(rows_of(k, HALF, HALF), k_eps, layouts, K_NORM, D)
    fence_async_shared()

    SHORTER: gl.constexpr = BLOCK // 4 * 3
    zero_1 = gl.zeros([ROWS, PART], gl.float32, mma_1)
    zero = column_parts(zero_1, zero_1 if D2 == 0 else gl.zeros([ROWS, D2 or 16], gl.float32, mma_2), D2)
    for i in range((q_length + ROWS - 1) // ROWS):
        mbarrier.wait(q_full.index(i), 0)
        q = read(matrix(q_tiles, i, ROWS, D2), layouts)
        u = folded_rows(q, gain, shift, q_eps, fold_scale, Q_NORM, FOLD, GAIN, Q_BIAS, D)
        if fixed_max:
            if k_length > SHORTER:
                acc, l, m = attend_fixed(u, k, v, zero, bound, k_length, v_full, BLOCK, CHUNK, num_warps)
            else:
                acc, l, m = attend_fixed(u, k, v, zero, bound, k_length, v_full, SHORTER, CHUNK, num_warps)
        else:
            if k_length > SHORTER:
                acc, l, m = attend(u, k, v, zero, score_scale, k_length, v_full, FOLD, BLOCK, CHUNK, num_warps)
            else:
                acc, l, m = attend(u, k, v, zero, score_scale, k_length, v_full, FOLD, SHORTER, CHUNK, num_warps)
        store_block(acc, l, m, q_tiles, out, lse_ptr, i, q_start, q_length, h, tokens, ROWS, D2, SAVE_LSE)
    tma.store_wait(0)


def forward_tile(
    call: Any, index: int, out: Tensor, lse: Tensor, save_lse: bool, *, block: int, chunk: int, warps: int = 4,
    fixed_max: bool = True, registers: int | None = None,
) -> None:  # fmt: skip
    norms = call.norms
    first, second = parts(max(call.width, PART.value))
    rows = 16 * warps
    tensors = dict(q=(call.q, rows), k=(call.k, block), v=(call.v, block), out=(out, rows))
    descriptors = {f"{name}_1": ragged(x, n, first) for name, (x, n) in tensors.items()}
    descriptors |= {f"{name}_2": ragged(x, n, second) if second else None for name, (x, n) in tensors.items()}
    options = {} if registers is None else dict(maxnreg=registers)
    hopper_forward_tile[call.grid(index)](
        **descriptors, **call.weights(), **call.work(index), lse_ptr=lse, q_eps=norms.q_eps, k_eps=norms.k_eps,
        fold_scale=call.fold_scale, score_scale=call.score_scale, H=call.heads, D=call.width, D2=second,
        Q_NORM=norms.q_kind, K_NORM=norms.k_kind, FOLD=call.fold, SAVE_LSE=save_lse, BLOCK=block, CHUNK=chunk,
        TRY_FIXED_MAX=fixed_max and 0 not in (norms.q_kind, norms.k_kind) and out.dtype != torch.float16, num_warps=warps,
        **options,
    )  # fmt: skip
