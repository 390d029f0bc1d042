"""Varlen attention, forward of short segments on Hopper, in Gluon. The maths stands in kernel.py.

A program owns one head of a whole segment, as forward_tile does, and reads everything once: all keys and values lie in
shared memory, query rows come in blocks. Rows come by TMA, the products are asynchronous, and two to three programs
share a multiprocessor: one's products and loads run under another's softmax. K is normalized in place. A block of
query rows is folded in registers and multiplied from there, so that the next block can be on its way at once:

    tile    holds
    K, V    k, then k̂; v
    Q       the next block of q

    for each block of rows:  q → u → for each chunk of keys: S = u·k̂ᵀ → P → acc += P·v → out

The softmax goes over chunks of keys, of which a segment of up to three quarters of the longest takes fewer. Its maximum
is fixed where both norms' weights bound all scores of a head by FIXED_MAX_LIMIT, whatever q and k are: with ‖q̂‖ and
‖k̂‖ ≤ √D, S_ij ≤ √D·fold_scale·(√D·max|γq γk| + ‖βq γk‖). Else it is online.

Barriers: k_full and v_full, each of one arrival and one phase, and q_full, a phase per block, say that TMA's rows are
there. None says that Q is free: all warps have read it when the next block is asked for. Rows past the segment's end
are loaded as zeros (see hopper_steps.py) and not stored.

T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
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
    operand,
    operands,
    read,
    row_statistics,
    scale_all,
    scale_columns,
    scale_rows,
    thread_sums,
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
def load_weights(
    q_weight_ptr, q_bias_ptr, k_weight_ptr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr,
    layouts, D: gl.constexpr, D2: gl.constexpr,
):  # fmt: skip
    """(gain, shift) = (γq γk, βq γk) of a head."""
    k_weight = load_vector(k_weight_ptr, K_WEIGHT, 1.0, layouts, D, D2)
    q_weight = load_vector(q_weight_ptr, Q_WEIGHT, 1.0, layouts, D, D2)
    q_bias = load_vector(q_bias_ptr, Q_BIAS, 0.0, layouts, D, D2)
    return multiply(q_weight, k_weight), multiply(q_bias, k_weight)


@gluon.jit
def score_bound(gain, shift, fold_scale, D: gl.constexpr):
    """What no score of a head exceeds, whatever q and k are: √D·fold_scale·(√D·max|gain| + ‖shift‖)."""
    largest, square = gl.max(gl.abs(gain[0]), 0), gl.sum(shift[0] * shift[0], 0)
    if len(gain) == 2:
        largest = gl.maximum(largest, gl.max(gl.abs(gain[1]), 0))
        square += gl.sum(shift[1] * shift[1], 0)
    root = gl.sqrt(gl.to_tensor(D + 0.0))
    return root * fold_scale * (root * largest + gl.sqrt(square))


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
def start_scores(u, k, START: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr):
    """u · k̂ᵀ of the keys from START."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COLUMNS, 16])
    keys = rows_of(k, START, COLUMNS)
    u = operands(u, k[0].dtype, gl.DotOperandLayout(0, mma, 2))
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
    if k_length < START + COLUMNS:
        keys = START + gl.arange(0, COLUMNS, gl.SliceLayout(0, s.type.layout))
        s = gl.where((keys < k_length)[None, :], s, -float("inf"))
    return s


@gluon.jit
def attend_keys(
    u, k, v, zero, bound, score_scale, k_length, v_full, FOLD: gl.constexpr, KEYS: gl.constexpr, CHUNK: gl.constexpr,
    FIXED_MAX: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """(acc, l, m) over the first KEYS keys: the softmax over chunks, online unless m is `bound` from the start."""
    ROWS: gl.constexpr = u[0].shape[0]
    CHUNKS: gl.constexpr = (KEYS + CHUNK - 1) // CHUNK
    mma_1: gl.constexpr = zero[0].type.layout
    row: gl.constexpr = gl.SliceLayout(1, mma_1)
    s = warpgroup_mma_wait(0, deps=[start_scores(u, k, 0, CHUNK, ROWS, num_warps)])
    acc = zero
    for c in gl.static_range(CHUNKS):
        if not FOLD:
            s = s * score_scale
        s = masked(s, c * CHUNK, k_length, min(CHUNK, KEYS - c * CHUNK))
        if FIXED_MAX:
            p = gl.exp2(s - bound)
        else:
            if c == 0:
                m = gl.convert_layout(gl.max(s, 1), row)
                m = gl.where(k_length > 0, m, 0.0)
            else:
                before = m
                m = gl.maximum(m, gl.convert_layout(gl.max(s, 1), row))
                rescale = gl.exp2(before - m)
                acc = scale_rows(acc, rescale)
            p = gl.exp2(s - gl.convert_layout(m, gl.SliceLayout(1, s.type.layout))[:, None])
        sums = thread_sums(p)
        if c == 0:
            l = sums
            mbarrier.wait(v_full, 0)
        else:
            if not FIXED_MAX:
                l = l * gl.convert_layout(rescale, gl.SliceLayout(1, l.type.layout))[:, None]
            l += gl.convert_layout(sums, l.type.layout)
        p_16 = operand(p, v[0].dtype, gl.DotOperandLayout(0, mma_1, 2))
        acc = start_output(p_16, rows_of(v, c * CHUNK, min(CHUNK, KEYS - c * CHUNK)), acc, c > 0)
        if c < CHUNKS - 1:
            s = start_scores(u, k, (c + 1) * CHUNK, min(CHUNK, KEYS - (c + 1) * CHUNK), ROWS, num_warps)
            acc, p_16, s = wait_for_output(acc, p_16, s, 0)
        else:
            acc, p_16, l = wait_for_output(acc, p_16, l, 0)
    l = gl.convert_layout(gl.sum(l, 1), row)
    if FIXED_MAX:
        m = gl.zeros_like(l) + bound
    return acc, l, m


@gluon.jit
def attend(
    u, k, v, zero, bound, score_scale, k_length, v_full, FOLD: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    FIXED_MAX: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """(acc, l, m) of a block of rows."""
    SHORTER: gl.constexpr = BLOCK // 4 * 3 if BLOCK > 64 else BLOCK
    if k_length > SHORTER or SHORTER == BLOCK:
        acc, l, m = attend_keys(
            u, k, v, zero, bound, score_scale, k_length, v_full, FOLD, BLOCK, CHUNK, FIXED_MAX, num_warps
        )
    else:
        acc, l, m = attend_keys(
            u, k, v, zero, bound, score_scale, k_length, v_full, FOLD, SHORTER, CHUNK, FIXED_MAX, num_warps
        )
    return acc, l, m


@gluon.jit
def ask_for_block(q, tiles, full, row, start, length, h, ROWS: gl.constexpr, D2: gl.constexpr):
    """The rows from `row` of q."""
    mbarrier.expect(full, ROWS * (PART + D2) * 2)
    load_block(q, tiles, 0, full, start, length, row, h)


@constexpr_function
def store_layout(rows: int, columns: int, warps: int) -> gl.DistributedLinearLayout:
    """Each warp keeps the rows that a product gives it; each thread has 8 columns side by side, 16 bytes."""
    lanes = [[0, 1 << i] for i in range(3, columns.bit_length() - 1)]
    below = [[1 << i, 0] for i in range(4)]
    room = 5 - len(lanes)
    registers = [[0, 1], [0, 2], [0, 4], *below[room:]]
    above = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [*lanes, *below[:room]], above, [], [rows, columns])


@gluon.jit
def store_columns(ptr, x, first_row, last_row, stride, START: gl.constexpr, D: gl.constexpr, num_warps: gl.constexpr):
    layout: gl.constexpr = store_layout(x.shape[0], x.shape[1], num_warps)
    rows = first_row + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    columns = START + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    pointers = ptr + rows.to(gl.int64)[:, None] * stride + columns[None, :]
    gl.store(pointers, gl.convert_layout(x, layout), mask=(rows < last_row)[:, None] & (columns < D)[None, :])


@gluon.jit
def store_part(ptr, x, first_row, last_row, stride, START: gl.constexpr, D: gl.constexpr, num_warps: gl.constexpr):
    """A column part. In halves, which take half the shared memory to change their layout in."""
    x = x.to(ptr.dtype.element_ty)
    if x.shape[1] > 32:
        HALF: gl.constexpr = x.shape[1] // 2
        first, second = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, HALF]), [0, 2, 1]))
        store_columns(ptr, first, first_row, last_row, stride, START, D, num_warps)
        store_columns(ptr, second, first_row, last_row, stride, START + HALF, D, num_warps)
    else:
        store_columns(ptr, x, first_row, last_row, stride, START, D, num_warps)


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def hopper_forward_tile(
    q_1, k_1, v_1, out_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr,
    offsets_ptr, first_item, items, tokens, tokens_k, q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr,
    k_weight_stride: gl.constexpr, q_eps, k_eps, fold_scale, score_scale, H: gl.constexpr, D: gl.constexpr,
    D2: gl.constexpr, Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr,
    K_WEIGHT: gl.constexpr, FOLD: gl.constexpr, SAVE_LSE: gl.constexpr, CLASS: gl.constexpr,
    BLOCK: gl.constexpr, CHUNK: gl.constexpr, TRY_FIXED_MAX: gl.constexpr,
    num_warps: gl.constexpr, q_2=None, k_2=None, v_2=None,
):  # fmt: skip
    work = gl.program_id(0)
    first_item, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    if work >= items * H:
        return
    DTYPE: gl.constexpr = q_1.dtype
    ROWS: gl.constexpr = 16 * num_warps
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    q_in, k_in, v_in = column_parts(q_1, q_2, D2), column_parts(k_1, k_2, D2), column_parts(v_1, v_2, D2)
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D2 or 16, 16])
    layouts: gl.constexpr = (mma_1, mma_2)

    kv_1 = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, BLOCK, PART], k_1.layout)
    q_tiles_1 = gl.allocate_shared_memory(DTYPE, [1, 1, 1, 1, ROWS, PART], q_1.layout)
    if D2 == 0:
        kv_tiles = (kv_1,)
        q_tiles = (q_tiles_1,)
    else:
        kv_tiles = (kv_1, gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, BLOCK, D2], k_2.layout))
        q_tiles = (q_tiles_1, gl.allocate_shared_memory(DTYPE, [1, 1, 1, 1, ROWS, D2], q_2.layout))
    # in one piece, which lives as long as the last of them: a barrier's memory must not serve as anything else, unless
    # it is invalidated first, and what stores `out` would be given k_full's
    barriers = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    k_full, v_full, q_full = barriers.index(0), barriers.index(1), barriers.index(2)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(q_full, count=1)
    fence_async_shared()

    h = work % H
    base = items_ptr + (first_item + work // H) * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    if q_length <= 0:
        return  # nothing to write; and no program may end before the rows that it asked for are there
    mbarrier.expect(k_full, BLOCK * (PART + D2) * 2)
    load_block(k_in, kv_tiles, 0, k_full, k_start, k_length, 0, h)
    ask_for_block(q_in, q_tiles, q_full, 0, q_start, q_length, h, ROWS, D2)
    mbarrier.expect(v_full, BLOCK * (PART + D2) * 2)
    load_block(v_in, kv_tiles, 1, v_full, k_start, k_length, 0, h)
    k, v = matrix(kv_tiles, 0, BLOCK, D2), matrix(kv_tiles, 1, BLOCK, D2)

    fixed_max, bound = False, 0.0
    if TRY_FIXED_MAX:
        gain, shift = load_weights(
            q_weight_ptr + h * q_weight_stride, q_bias_ptr + h * q_bias_stride, k_weight_ptr + h * k_weight_stride,
            Q_WEIGHT, Q_BIAS, K_WEIGHT, layouts, D, D2,
        )  # fmt: skip
        bound = score_bound(gain, shift, gl.abs(fold_scale), D)
        fixed_max = bound <= FIXED_MAX_LIMIT

    mbarrier.wait(k_full, 0)
    if K_NORM != NONE:
        for start in gl.static_range(0, BLOCK, 64):
            if start < k_length:
                normalize_rows(rows_of(k, start, 64), k_eps, layouts, K_NORM, D)
    fence_async_shared()

    zero_1 = gl.zeros([ROWS, PART], gl.float32, mma_1)
    zero = column_parts(zero_1, zero_1 if D2 == 0 else gl.zeros([ROWS, D2 or 16], gl.float32, mma_2), D2)
    phase = 0
    for row in range(0, q_length, ROWS):
        mbarrier.wait(q_full, phase)
        phase ^= 1
        q = read(matrix(q_tiles, 0, ROWS, D2), layouts)
        if row + ROWS < q_length:
            ask_for_block(q_in, q_tiles, q_full, row + ROWS, q_start, q_length, h, ROWS, D2)
        # loaded again for each block: kept, they would cost registers
        gain, shift = load_weights(
            q_weight_ptr + h * q_weight_stride, q_bias_ptr + h * q_bias_stride, k_weight_ptr + h * k_weight_stride,
            Q_WEIGHT, Q_BIAS, K_WEIGHT, layouts, D, D2,
        )  # fmt: skip
        u = folded_rows(q, gain, shift, q_eps, fold_scale, Q_NORM, FOLD, GAIN, Q_BIAS, D)
        if fixed_max:
            acc, l, m = attend(u, k, v, zero, bound, score_scale, k_length, v_full, FOLD, BLOCK, CHUNK, True, num_warps)
        else:
            acc, l, m = attend(
                u, k, v, zero, bound, score_scale, k_length, v_full, FOLD, BLOCK, CHUNK, False, num_warps
            )
        acc = scale_rows(acc, gl.where(l == 0, 0.0, 1.0 / l))
        for c in gl.static_range(len(acc)):
            store_part(out_ptr + h * D, acc[c], q_start + row, q_start + q_length, H * D, c * PART, D, num_warps)
        if SAVE_LSE:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, mma_1))
            pointers = lse_ptr + h.to(gl.int64) * tokens + q_start + rows
            gl.store(pointers, m + gl.log2(l), mask=rows < q_length)


@functools.lru_cache(1024)
def bound_tile(
    signature: Any, index: int, save_lse: bool, block: int, chunk: int, warps: int, fixed_max: bool,
    registers: int | None,
) -> BoundKernel:  # fmt: skip
    return bind(
        hopper_forward_tile, signature, index, registers, SAVE_LSE=save_lse, BLOCK=block, CHUNK=chunk,
        TRY_FIXED_MAX=fixed_max and signature.bounds_scores and signature.norm_numbers["Q_NORM"] != 0, num_warps=warps,
    )  # fmt: skip


def forward_tile(
    call: Any, index: int, out: Tensor, lse: Tensor, save_lse: bool, *, block: int, chunk: int, warps: int = 4,
    fixed_max: bool = True, registers: int | None = None,
) -> None:  # fmt: skip
    signature = call.signature
    descriptors = ragged_parts(signature.width, 16 * warps, q=call.q)
    descriptors |= ragged_parts(signature.width, block, k=call.k, v=call.v)
    bound_tile(signature, index, save_lse, block, chunk, warps, fixed_max, registers)(
        call.grid(index), **descriptors, **call.weight_pointers, **call.work(index), out_ptr=out, lse_ptr=lse
    )
