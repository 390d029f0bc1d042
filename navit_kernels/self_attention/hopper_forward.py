"""Varlen attention, forward of long segments on Hopper, in Gluon. The maths stands in kernel.py.

Programs stay and take work in turns, an item's head at a time, the longest segments first. In each, one warp loads by
TMA and GROUPS warpgroups multiply, ROWS query rows each. A warpgroup's products run under its own softmax (P of a tile
of keys is multiplied while the next tile's P is made) and under that of the multiprocessor's other warpgroup, which is
another program's where registers allow two.

    loader        q ──q_full── → q_mem         r, K, V ──full── → stages          (q_empty, empty: free again)
    warpgroups    u = fold(q) → u_mem; per stage:  S = u·Kᵀ   acc += P·V   P = exp2(S·r − m);   out → u_mem → TMA

A stage holds what one step reads: the keys (and r) of a tile and the values of the tile before it, whose P the step
before has made. The keys of an item's first tile so come with the values of the last item's last tile. The first tile
of an item is the segment's last, partial one: the only one with a mask.

Rows past the segment's end are loaded as zeros and not stored; see hopper_steps.py. r comes by item, as key_sizes
writes it: so that all its loads start at a multiple of 16 bytes.

Without a norm of k nothing bounds the scores. A first attempt then keeps, as if it were fixed, the maximum of the first
tile: it never exceeds the true one, so that nothing is lost below, and the sums tell whether a P was too large. Tiles
of queries where one was are not stored, and are taken up again, with a running maximum, when all others are done: at
worst, all of them, in 1.9 times the running maximum's time; else in 0.86 of it (U4096).

    warpgroups    held ── verdict ──→ loader and warpgroups: a second attempt at what did not hold

T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .._jit import BoundKernel, multiprocessors
from ..head_norm import NORM_CODES
from ..plan import TILE as PLAN_TILE
from .config import Launch
from .hopper_forward_steps import (
    fold_rows,
    load_r,
    next_stage,
    opaque_zero,
    softmax_step,
    stream_step,
    vector_sum,
)
from .hopper_steps import PART, bind, items_of_class, load_tile, numbers, ragged_parts, segment_rows
from .hopper_tile_steps import (
    column_parts,
    load_block,
    load_vector,
    matrix,
    multiply,
    read,
    row_dot,
    scale_all,
    scale_rows,
    start_adding,
    start_dot_rows,
    store_tile,
    thread_sums,
    wait_for,
    write,
)
from .kernel import FIXED_MAX_LIMIT
from .steps import LAYER_NORM, NONE

TILE = gl.constexpr(PLAN_TILE)
LOADER_REGISTERS = gl.constexpr(24)
LARGEST_SUM = gl.constexpr(2.0**60)  # of P under the first tile's maximum: times v up to 2⁶⁷ it is below infinity
REGISTERS = 1 << 16  # of a multiprocessor


@gluon.jit
def load_work(
    items_ptr, held_ptr, first_item, turn, count, tokens, tokens_k, H: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr, AGAIN: gl.constexpr,
):  # fmt: skip
    """(h, q_start, q_length, k_start, k_length, tile, key tiles, row of r, work) of a program's turn-th work.

    No key tiles where there is nothing to do: AGAIN, where the first attempt held. The programs take turns to and fro,
    so that none has the longest of every turn.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    place = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    work = gl.minimum(place, count - 1)
    h = work % H
    base = items_ptr + (first_item + work // H) * 8
    q_start, k_start, tile = gl.load(base), gl.load(base + 2), gl.load(base + 4)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    wanted = (place < count) & (tile * TILE < q_length)
    if AGAIN:
        wanted = wanted & (all_held(held_ptr, work, GROUPS) == 0)
    key_tiles = gl.where(wanted, gl.maximum(gl.cdiv(k_length, BLOCK_N), 1), 0)
    return h, q_start, q_length, k_start, k_length, tile, key_tiles, work // H - tile, work


@gluon.jit
def all_held(held_ptr, place, GROUPS: gl.constexpr):
    """Whether what every warpgroup says of a work, or behind the works of a program, is 1."""
    held = gl.load(held_ptr + place * GROUPS)
    if GROUPS == 2:
        held = gl.minimum(held, gl.load(held_ptr + place * GROUPS + 1))
    return held


@gluon.jit
def load(
    q_1, k_1, v_1, r_tiles, q_2, k_2, v_2, q_mem_1, k_mem_1, v_mem_1, q_mem_2, k_mem_2, v_mem_2, r_mem, q_full, q_empty,
    full, empty, verdict, held_ptr, items_ptr, first_item, count, tokens, tokens_k, slots, H: gl.constexpr,
    D2: gl.constexpr, K_NORM: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ATTEMPTS: gl.constexpr,
):  # fmt: skip
    q_in, k_in, v_in = column_parts(q_1, q_2, D2), column_parts(k_1, k_2, D2), column_parts(v_1, v_2, D2)
    q_mem, k_mem = column_parts(q_mem_1, q_mem_2, D2), column_parts(k_mem_1, k_mem_2, D2)
    v_mem = column_parts(v_mem_1, v_mem_2, D2)
    ROW_BYTES: gl.constexpr = (PART + D2) * 2
    KEY_BYTES: gl.constexpr = BLOCK_N * ROW_BYTES + (BLOCK_N * 4 if K_NORM != NONE else 0)
    stage, phase, q_phase = 0, 1, 1
    turns = gl.cdiv(count, gl.num_programs(0))
    for attempt in gl.static_range(ATTEMPTS):
        v_start, v_length, v_h, v_row = 0, 0, 0, -1  # of the tile before
        for turn in range(turns):
            h, q_start, q_length, k_start, k_length, tile, key_tiles, slot, _ = load_work(
                items_ptr, held_ptr, first_item, turn, count, tokens, tokens_k, H, BLOCK_N, GROUPS, attempt > 0
            )
            if key_tiles > 0:
                mbarrier.wait(q_empty, q_phase)
                q_phase ^= 1
                mbarrier.expect(q_full, GROUPS * ROWS * ROW_BYTES)
                for group in gl.static_range(GROUPS):
                    load_block(q_in, q_mem, group, q_full, q_start, q_length, tile * TILE + group * ROWS, h)
            for j in range(key_tiles):
                row = gl.where(j == 0, key_tiles - 1, j - 1) * BLOCK_N
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), KEY_BYTES, pred=v_row < 0)
                mbarrier.expect(full.index(stage), KEY_BYTES + BLOCK_N * ROW_BYTES, pred=v_row >= 0)
                load_block(k_in, k_mem, stage, full.index(stage), k_start, k_length, row, h)
                if K_NORM != NONE:
                    load_tile(r_tiles, [(h * slots + slot) * TILE + row], full.index(stage), r_mem.index(stage))
                if v_row >= 0:
                    load_block(v_in, v_mem, stage, full.index(stage), v_start, v_length, v_row, v_h)
                v_start, v_length, v_h, v_row = k_start, k_length, h, row
                stage, phase = next_stage(stage, phase, STAGES)
        if v_row >= 0:
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BLOCK_N * ROW_BYTES)
            load_block(v_in, v_mem, stage, full.index(stage), v_start, v_length, v_row, v_h)
            if ATTEMPTS == 2:
                stage, phase = next_stage(stage, phase, STAGES)
        if attempt + 1 < ATTEMPTS:
            mbarrier.wait(verdict, 0)
            turns = gl.where(all_held(held_ptr, count + gl.program_id(0), GROUPS) == 0, turns, 0)


@gluon.jit
def attend(
    out, s, q_start, q_length, k_length, row, h, key_tiles, bound, stored, u_mem, k_mem, v_mem, r_mem, full, empty,
    stage, phase, lse_ptr, tokens, score_scale, GROUP: gl.constexpr, D2: gl.constexpr, K_NORM: gl.constexpr,
    FOLD: gl.constexpr, SAVE_LSE: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BOUNDED: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """All keys of a segment for ROWS rows of u, of the last of which s has the scores; out and lse, where `stored`.

    BOUNDED: the maximum is bound; or FIXED: it is the first tile's, and nothing is stored where a sum says that this
    was too small. Returns whether it was not, and stage and phase of the next item's keys.
    """
    DTYPE: gl.constexpr = u_mem[0].dtype
    PARTS: gl.constexpr = len(u_mem)
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 or 16, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_1, 2)
    col_s: gl.constexpr = gl.SliceLayout(0, mma_s)
    row_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    SCALED: gl.constexpr = K_NORM != NONE or not FOLD
    zero_s = gl.zeros([ROWS, BLOCK_N], gl.float32, mma_s)
    u = matrix(u_mem, GROUP, ROWS, D2)

    # ---- the segment's last keys, masked
    r = load_r(r_mem, stage, score_scale, col_s, K_NORM, FOLD, BLOCK_N)
    valid = (key_tiles - 1) * BLOCK_N + gl.arange(0, BLOCK_N, col_s) < k_length
    m = bound if BOUNDED else gl.full([ROWS], -float("inf"), gl.float32, row_s)
    p, m, l, _ = softmax_step(s, r, m, thread_sums(zero_s), valid, True, BOUNDED, SCALED)
    p = gl.convert_layout(p.to(DTYPE), operand)
    zero_1 = gl.zeros([ROWS, PART], gl.float32, mma_1)
    acc = column_parts(zero_1, zero_1 if D2 == 0 else gl.zeros([ROWS, D2 or 16], gl.float32, mma_2), D2)
    mbarrier.arrive(empty.index(stage))
    stage, phase = next_stage(stage, phase, STAGES)

    for _ in range(1, key_tiles):
        acc, p, m, l, stage, phase = stream_step(
            acc, p, m, l, u, zero_s, valid, k_mem, v_mem, r_mem, full, empty, stage, phase, score_scale, D2, K_NORM,
            FOLD, BLOCK_N, STAGES, FIXED,
        )  # fmt: skip

    # ---- the last tile's values, which came with the next item's keys
    mbarrier.wait(full.index(stage), phase)
    acc = wait_for(start_adding(p, matrix(v_mem, stage, BLOCK_N, D2), acc), 0)
    total = gl.convert_layout(gl.sum(l, 1), row_s)
    held = 1
    if FIXED and not BOUNDED:  # not so where all scores of the first tile were −inf, and where there is a NaN
        holds = (total >= 0.5) & (total <= LARGEST_SUM) | (k_length <= 0)
        held = gl.min(holds.to(gl.int32), 0)
        stored = held
    if stored != 0:
        acc = scale_rows(acc, gl.where(total == 0, 0.0, 1.0 / total))
        write(u, acc)
        for c in gl.static_range(PARTS):
            store_tile(out[c], segment_rows(q_start, q_length, row, h, c * PART), u_mem[c].index(GROUP))
        if SAVE_LSE:
            rows = row + gl.arange(0, ROWS, row_s)
            lse = gl.where(total == 0, -float("inf"), m + gl.log2(total))
            gl.store(lse_ptr + h.to(gl.int64) * tokens + q_start + rows, lse, mask=rows < q_length)
    return held, stage, phase


@gluon.jit
def consume(
    out_1, out_2, q_mem_1, u_mem_1, k_mem_1, v_mem_1, q_mem_2, u_mem_2, k_mem_2, v_mem_2, r_mem, q_full, q_empty, full,
    empty, verdict, held_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item, count, tokens,
    tokens_k, q_weight_stride, q_bias_stride, k_weight_stride, q_eps, fold_scale, score_scale, GROUP: gl.constexpr,
    H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr, K_NORM: gl.constexpr,
    Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr, SAVE_LSE: gl.constexpr,
    TRY_FIXED_MAX: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
    ATTEMPTS: gl.constexpr,
):  # fmt: skip
    out = column_parts(out_1, out_2, D2)
    q_mem, u_mem = column_parts(q_mem_1, q_mem_2, D2), column_parts(u_mem_1, u_mem_2, D2)
    k_mem, v_mem = column_parts(k_mem_1, k_mem_2, D2), column_parts(v_mem_1, v_mem_2, D2)
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    CENTRE: gl.constexpr = K_NORM == LAYER_NORM
    DTYPE: gl.constexpr = u_mem_1.dtype
    rows_1: gl.constexpr = gl.BlockedLayout([1, PART // 2], [16, 2], [4, 1], [1, 0])
    rows_2: gl.constexpr = gl.BlockedLayout([1, (D2 or 16) // 2], [16, 2], [4, 1], [1, 0])
    layouts: gl.constexpr = (rows_1, rows_2)
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    row_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    stage, phase, q_phase = 0, 0, 0
    turns = gl.cdiv(count, gl.num_programs(0))
    for attempt in gl.static_range(ATTEMPTS):
        worked, all_hold = 0, 1
        next_work = load_work(
            items_ptr, held_ptr, first_item, 0, count, tokens, tokens_k, H, BLOCK_N, GROUPS, attempt > 0
        )  # fmt: skip
        for turn in range(turns):
            h, q_start, q_length, _, k_length, tile, key_tiles, _, work = next_work
            next_work = load_work(  # early: its loads take as long as a step
                items_ptr, held_ptr, first_item, turn + 1, count, tokens, tokens_k, H, BLOCK_N, GROUPS, attempt > 0
            )  # fmt: skip
            row = tile * TILE + GROUP * ROWS
            if key_tiles > 0:
                gain, shift = (None, None), (None, None)
                here = opaque_zero()  # so that weights are not kept over the turns, in registers that spill
                if GAIN:
                    k_weight = load_vector(k_weight_ptr + h * k_weight_stride + here, K_WEIGHT, 1.0, layouts, D, D2)
                    q_weight = load_vector(q_weight_ptr + h * q_weight_stride + here, Q_WEIGHT, 1.0, layouts, D, D2)
                    gain = multiply(q_weight, k_weight)
                if Q_BIAS:
                    shift = load_vector(q_bias_ptr + h * q_bias_stride + here, Q_BIAS, 0.0, layouts, D, D2)
                    if GAIN:
                        shift = multiply(shift, k_weight)
                    shift = scale_all(shift, fold_scale)
                gain_sum, shift_sum = gl.to_tensor(D + 0.0), gl.to_tensor(0.0)
                if CENTRE and GAIN:
                    gain_sum = vector_sum(gain)
                if CENTRE and Q_BIAS:
                    shift_sum = vector_sum(shift)
                mbarrier.wait(q_full, q_phase)
                tma.store_wait(0)
                u = read(matrix(q_mem, GROUP, ROWS, D2), layouts)
                if FOLD:
                    u = fold_rows(
                        u, gain, shift, gain_sum, shift_sum, q_eps, fold_scale, Q_NORM, CENTRE, GAIN, Q_BIAS, DTYPE, D
                    )  # fmt: skip
                write(matrix(u_mem, GROUP, ROWS, D2), u)
                mbarrier.arrive(q_empty)
                q_phase ^= 1
                bound = gl.zeros([ROWS], gl.float32, row_s)
                if TRY_FIXED_MAX and ATTEMPTS == 1:
                    bound = gl.convert_layout(gl.sqrt(row_dot(u, u) * D), row_s)
                    if not FOLD:
                        bound = bound * score_scale
                # one product for both maxima: where each had its own, ptxas 12.8 left a descriptor of one unwritten
                mbarrier.wait(full.index(stage), phase)
                u_now, k_now = matrix(u_mem, GROUP, ROWS, D2), matrix(k_mem, stage, BLOCK_N, D2)
                s = start_dot_rows(u_now, k_now, gl.zeros([ROWS, BLOCK_N], gl.float32, mma_s), 0, ROWS)
                s = warpgroup_mma_wait(0, deps=[s])
                if TRY_FIXED_MAX and ATTEMPTS == 1:
                    if gl.max(bound, 0) <= FIXED_MAX_LIMIT:
                        _, stage, phase = attend(
                            out, s, q_start, q_length, k_length, row, h, key_tiles, bound, 1, u_mem, k_mem, v_mem,
                            r_mem, full, empty, stage, phase, lse_ptr, tokens, score_scale, GROUP, D2, K_NORM, FOLD,
                            SAVE_LSE, ROWS, BLOCK_N, STAGES, True, True,
                        )  # fmt: skip
                    else:
                        _, stage, phase = attend(
                            out, s, q_start, q_length, k_length, row, h, key_tiles, bound, 1, u_mem, k_mem, v_mem,
                            r_mem, full, empty, stage, phase, lse_ptr, tokens, score_scale, GROUP, D2, K_NORM, FOLD,
                            SAVE_LSE, ROWS, BLOCK_N, STAGES, False, False,
                        )  # fmt: skip
                else:
                    stored = 1 if attempt == 0 else 1 - gl.load(held_ptr + work * GROUPS + GROUP)
                    held, stage, phase = attend(
                        out, s, q_start, q_length, k_length, row, h, key_tiles, bound, stored, u_mem, k_mem, v_mem,
                        r_mem, full, empty, stage, phase, lse_ptr, tokens, score_scale, GROUP, D2, K_NORM, FOLD,
                        SAVE_LSE, ROWS, BLOCK_N, STAGES, False, attempt + 1 < ATTEMPTS,
                    )  # fmt: skip
                    if attempt + 1 < ATTEMPTS:
                        gl.store(held_ptr + work * GROUPS + GROUP, held)
                        worked, all_hold = 1, gl.minimum(all_hold, held)
        if attempt + 1 < ATTEMPTS:
            program = gl.program_id(0)
            gl.store(held_ptr + (count + program) * GROUPS + GROUP, all_hold)
            mbarrier.arrive(verdict)
            mbarrier.wait(verdict, 0)
            turns = gl.where(all_held(held_ptr, count + program, GROUPS) == 0, turns, 0)
            if worked != 0:  # the last values came without keys
                mbarrier.arrive(empty.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "slots"])
def hopper_forward_stream(
    q_1, k_1, v_1, out_1, r_tiles, q_2, k_2, v_2, out_2, held_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr,
    items_ptr, offsets_ptr, first_item, items, tokens, tokens_k, slots, q_weight_stride: gl.constexpr,
    q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, q_eps, fold_scale, score_scale, H: gl.constexpr,
    D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr,
    Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr, SAVE_LSE: gl.constexpr,
    TRY_FIXED_MAX: gl.constexpr, CLASS: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPARE: gl.constexpr,
):  # fmt: skip
    first_item, items = items_of_class(offsets_ptr, first_item, items, CLASS)
    count = items * H
    ATTEMPTS: gl.constexpr = 2 if TRY_FIXED_MAX and K_NORM == NONE else 1
    DTYPE: gl.constexpr = q_1.dtype
    q_mem_1 = gl.allocate_shared_memory(DTYPE, [GROUPS, 1, 1, 1, ROWS, PART], q_1.layout)
    u_mem_1 = gl.allocate_shared_memory(DTYPE, [GROUPS, 1, 1, 1, ROWS, PART], q_1.layout)
    k_mem_1 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, PART], k_1.layout)
    v_mem_1 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, PART], v_1.layout)
    if D2 == 0:
        q_mem_2, u_mem_2, k_mem_2, v_mem_2 = q_mem_1, u_mem_1, k_mem_1, v_mem_1
    else:
        q_mem_2 = gl.allocate_shared_memory(DTYPE, [GROUPS, 1, 1, 1, ROWS, D2], q_2.layout)
        u_mem_2 = gl.allocate_shared_memory(DTYPE, [GROUPS, 1, 1, 1, ROWS, D2], q_2.layout)
        k_mem_2 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, D2], k_2.layout)
        v_mem_2 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, D2], v_2.layout)
    r_mem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], r_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    verdict = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=GROUPS)
    mbarrier.init(verdict, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    # the tuples stand in the call: in a variable, their constants would become tensors
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (consume, (
                    out_1, out_2, q_mem_1, u_mem_1, k_mem_1, v_mem_1, q_mem_2, u_mem_2, k_mem_2, v_mem_2, r_mem, q_full,
                    q_empty, full, empty, verdict, held_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr,
                    first_item, count, tokens, tokens_k, q_weight_stride, q_bias_stride, k_weight_stride, q_eps,
                    fold_scale, score_scale, 0, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD, SAVE_LSE,
                    TRY_FIXED_MAX, ROWS, BLOCK_N, STAGES, GROUPS, ATTEMPTS,
                )),
                (load, (
                    q_1, k_1, v_1, r_tiles, q_2, k_2, v_2, q_mem_1, k_mem_1, v_mem_1, q_mem_2, k_mem_2, v_mem_2, r_mem,
                    q_full, q_empty, full, empty, verdict, held_ptr, items_ptr, first_item, count, tokens, tokens_k,
                    slots, H, D2, K_NORM, GROUPS, ROWS, BLOCK_N, STAGES, ATTEMPTS,
                )),
            ], [1], [LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    out_1, out_2, q_mem_1, u_mem_1, k_mem_1, v_mem_1, q_mem_2, u_mem_2, k_mem_2, v_mem_2, r_mem, q_full,
                    q_empty, full, empty, verdict, held_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr,
                    first_item, count, tokens, tokens_k, q_weight_stride, q_bias_stride, k_weight_stride, q_eps,
                    fold_scale, score_scale, 0, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD, SAVE_LSE,
                    TRY_FIXED_MAX, ROWS, BLOCK_N, STAGES, GROUPS, ATTEMPTS,
                )),
                (consume, (
                    out_1, out_2, q_mem_1, u_mem_1, k_mem_1, v_mem_1, q_mem_2, u_mem_2, k_mem_2, v_mem_2, r_mem, q_full,
                    q_empty, full, empty, verdict, held_ptr, lse_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr,
                    first_item, count, tokens, tokens_k, q_weight_stride, q_bias_stride, k_weight_stride, q_eps,
                    fold_scale, score_scale, 1, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD, SAVE_LSE,
                    TRY_FIXED_MAX, ROWS, BLOCK_N, STAGES, GROUPS, ATTEMPTS,
                )),
                (load, (
                    q_1, k_1, v_1, r_tiles, q_2, k_2, v_2, q_mem_1, k_mem_1, v_mem_1, q_mem_2, k_mem_2, v_mem_2, r_mem,
                    q_full, q_empty, full, empty, verdict, held_ptr, items_ptr, first_item, count, tokens, tokens_k,
                    slots, H, D2, K_NORM, GROUPS, ROWS, BLOCK_N, STAGES, ATTEMPTS,
                )),
            ], [4, 1], [SPARE, LOADER_REGISTERS],
        )  # fmt: skip


def key_size_tiles(call: Any, index: int) -> Tensor:
    """Room for r of each item's keys, float32 (H, items of the class, TILE); nothing without a norm of k."""
    slots = call.grid(index)[0] // call.heads if call.norms.k_kind else 1
    return call.q.new_empty((call.heads, slots, TILE.value), dtype=torch.float32)


@functools.lru_cache(1024)
def bound_stream(signature: Any, index: int, launch: Launch, save_lse: bool, fixed_max: bool) -> BoundKernel:
    groups = launch.warps // 4
    threads = 32 * (launch.warps + 4)
    spare = (launch.registers * threads - LOADER_REGISTERS.value * 128) // (groups * 128) // 8 * 8
    return bind(
        hopper_forward_stream, signature, index, launch.registers, SAVE_LSE=save_lse,
        TRY_FIXED_MAX=fixed_max, GROUPS=groups, ROWS=launch.block_m // groups, BLOCK_N=launch.block_n,
        STAGES=launch.stages, SPARE=min(spare, 240), num_warps=4,
    )  # fmt: skip


def forward_stream(
    call: Any, index: int, launch: Launch, out: Tensor, lse: Tensor, r_tiles: Tensor, save_lse: bool, fixed_max: bool
) -> None:
    """All items of the last class. launch: a row of the launch table; block_m: query rows of a program, TILE of them
    or an even part."""
    width, groups = call.signature.width, launch.warps // 4
    rows = launch.block_m // groups
    (count,) = call.grid(index)
    most = multiprocessors(call.q.device) * (REGISTERS // (32 * (launch.warps + 4) * launch.registers))
    programs, held = min(most, count), call.items
    if fixed_max and call.norms.k_kind == NORM_CODES[None]:  # of each work, and of all of each program's
        held = call.q.new_empty((count + programs) * groups, dtype=torch.int32)
    bound_stream(call.signature, index, launch, save_lse, fixed_max)(
        (programs,), **ragged_parts(width, rows, q=call.q, out=out),
        **ragged_parts(width, launch.block_n, k=call.k, v=call.v), **call.weight_pointers, **call.work(index),
        r_tiles=numbers(r_tiles, launch.block_n), slots=r_tiles.shape[1], held_ptr=held, lse_ptr=lse,
    )  # fmt: skip
