"""Varlen attention, backward of long segments on Hopper, in Gluon. The maths stands in kernel.py.

Two kernels after backward_prepare, as in kernel_backward.py: hopper_keys owns keys (dk, dv), hopper_queries owns
queries (dq over u): seven products, no sum between programs. A program stays on its multiprocessor and takes one item
of TILE rows and one head after another. One warp loads (TMA); two warpgroups own BLOCK rows each, exchange nothing:

    hopper_keys     own k, v; u, dO, lse, Δ pass      Sᵀ = K·uᵀ   dPᵀ = V·dOᵀ   dV += Pᵀ·dO   a += Gᵀ·u
    hopper_queries  own u, dO; k, v, r pass           S = u·Kᵀ    dP = dO·Vᵀ    du += G·K

The rows a warpgroup owns are the left operands of the first two products and stay in registers, as do P and G, left
operands of the others: in the loop nothing is written to shared memory. The products of one block that take P and G
run under the softmax of the next:

    matrix unit   S₀ dP₀        │ S₁ dP₁ dV₀ a₀       │ S₂ dP₂ dV₁ a₁       │ dV₂ a₂
    registers            P₀ G₀  │          P₁  G₁     │          P₂  G₂     │

Barriers: own_full and own_empty of a warpgroup's rows, full and empty of each stage of what passes, and q_full for the
raw q of hopper_queries' epilogue, which comes into the tile that dq leaves by.

Per-row numbers pass by TMA, too, whose starts are multiples of 16 bytes: backward_prepare writes them item by item,
padded to TILE: rows (items, H, TILE / BLOCK, 2, BLOCK) of (lse, Δ), lse = +inf past the end, and sizes (items, H, TILE)
of r_k, 0 past the end. Rows past a segment's end are loaded as zeros and never stored (see hopper_steps.py). Only the
last block of keys of hopper_queries needs a mask, and it is the first to pass.

T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._jit import launch_kernel
from .hopper_steps import PART, load_tile, parts, ragged, segment_rows, shared_layout
from .hopper_tile_steps import (
    affine_rows,
    column_parts,
    load_vector,
    matrix,
    multiply,
    read,
    row_statistics,
    row_sum,
    scale_all,
    scale_columns,
    store_column_sums,
    store_tile,
    unit_rows_backward,
    wait_for,
    widen,
    write,
)
from .steps import LAYER_NORM, NONE

BLOCK = gl.constexpr(64)  # rows of a warpgroup, and of a block that passes
GROUPS = gl.constexpr(2)  # warpgroups of a program; BLOCK · GROUPS = TILE


@gluon.jit
def read_item(items_ptr, first_item, w, work, H: gl.constexpr, tokens, tokens_k):
    """Of the w-th pair of an item and a head: (q_start, q_length, k_start, k_length, tile). Read one pair ahead, as
    the loads take a microsecond; past the last pair it is the last one's."""
    base = items_ptr + (first_item + gl.minimum(w, work - 1) // H) * 8
    q_start, k_start = gl.load(base), gl.load(base + 2)
    # a plan of other lengths must not lead outside the tensors
    q_length = gl.minimum(gl.load(base + 1), tokens - q_start)
    k_length = gl.minimum(gl.load(base + 3), tokens_k - k_start)
    return q_start, q_length, k_start, k_length, gl.load(base + 4)


@gluon.jit
def load_parts(source, tiles, i, full, start, length, row, h):
    """BLOCK rows of a segment's head into tile i, by TMA."""
    for c in gl.static_range(len(tiles)):
        load_tile(source[c], segment_rows(start, length, row, h, c * PART), full, tiles[c].index(i))


@gluon.jit
def store_parts(target, tiles, i, start, length, row, h):
    for c in gl.static_range(len(tiles)):
        store_tile(target[c], segment_rows(start, length, row, h, c * PART), tiles[c].index(i))


@gluon.jit
def tiles_of(source_1, source_2, COUNT: gl.constexpr, D2: gl.constexpr):
    first = gl.allocate_shared_memory(source_1.dtype, [COUNT, 1, 1, 1, BLOCK, PART], source_1.layout)
    if D2 == 0:
        return (first,)
    else:
        return (first, gl.allocate_shared_memory(source_1.dtype, [COUNT, 1, 1, 1, BLOCK, D2], source_2.layout))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(memory.index(i), count=ARRIVALS)
    return memory


@gluon.jit
def pass_by(full, empty, step, blocks, STAGES: gl.constexpr):
    """Let all blocks pass unused; returns the next step."""
    for _ in range(blocks):
        s = step % STAGES
        mbarrier.wait(full.index(s), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(s), count=1)
        step += 1
    return step


@gluon.jit
def left_operand(x, layouts, HOLD: gl.constexpr):
    """A matrix in shared memory as left operand, in registers with HOLD."""
    if not HOLD:
        return x
    else:
        first = x[0].load(gl.DotOperandLayout(0, layouts[0], 2))
        if len(x) == 1:
            return (first,)
        else:
            return (first, x[1].load(gl.DotOperandLayout(0, layouts[0], 2)))


@gluon.jit
def start_scores(x, y, zero):
    """x · yᵀ."""
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
def zeros(layouts, D2: gl.constexpr):
    first = gl.zeros([BLOCK, PART], gl.float32, layouts[0])
    if D2 == 0:
        return (first,)
    else:
        return (first, gl.zeros([BLOCK, D2], gl.float32, layouts[1]))


@gluon.jit
def narrow(x, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """A left operand of `start_adding`."""
    return gl.convert_layout(x.to(DTYPE), LAYOUT)


@gluon.jit
def finish(scores, product, held):
    """All that is under way, once it is there, and `held`, computed meanwhile."""
    if len(product) == 1:
        scores, first, held = warpgroup_mma_wait(0, deps=[scores, product[0], held])
        return scores, (first,), held
    else:
        scores, first, second, held = warpgroup_mma_wait(0, deps=[scores, product[0], product[1], held])
        return scores, (first, second), held


@gluon.jit
def finish_three(scores, x, y, held):
    if len(x) == 1:
        scores, x_1, y_1, held = warpgroup_mma_wait(0, deps=[scores, x[0], y[0], held])
        return scores, (x_1,), (y_1,), held
    else:
        scores, x_1, x_2, y_1, y_2, held = warpgroup_mma_wait(0, deps=[scores, x[0], x[1], y[0], y[1], held])
        return scores, (x_1, x_2), (y_1, y_2), held


@gluon.jit
def finish_two(x, y, held):
    if len(x) == 1:
        x_1, y_1, held = warpgroup_mma_wait(0, deps=[x[0], y[0], held])
        return (x_1,), (y_1,), held
    else:
        x_1, x_2, y_1, y_2, held = warpgroup_mma_wait(0, deps=[x[0], x[1], y[0], y[1], held])
        return (x_1, x_2), (y_1, y_2), held


# ---- programs that own keys


@gluon.jit
def keys_loader(
    k_in, v_in, u_in, dout_in, rows_in, sizes_in, items_ptr, first_item, work, tokens, tokens_k, k_tiles, v_tiles,
    size_tiles, u_tiles, dout_tiles, lse_tiles, delta_tiles, own_full, own_empty, full, empty, H: gl.constexpr,
    D2: gl.constexpr, K_NORM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = 2 * BLOCK * (PART + D2) * 2
    SIZE_BYTES: gl.constexpr = BLOCK * 4 if K_NORM != NONE else 0
    TILE_ROWS: gl.constexpr = BLOCK * GROUPS
    step = 0
    turn = 0
    following = read_item(items_ptr, first_item, gl.program_id(0), work, H, tokens, tokens_k)
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item = w // H
        h = w % H
        q_start, q_length, k_start, k_length, tile = following
        following = read_item(items_ptr, first_item, w + gl.num_programs(0), work, H, tokens, tokens_k)
        if tile * TILE_ROWS < k_length:
            for g in gl.static_range(GROUPS):
                row = tile * TILE_ROWS + g * BLOCK
                mbarrier.wait(own_empty.index(g), (turn & 1) ^ 1)
                mbarrier.expect(own_full.index(g), BYTES + SIZE_BYTES)
                load_parts(k_in, k_tiles, g, own_full.index(g), k_start, k_length, row, h)
                load_parts(v_in, v_tiles, g, own_full.index(g), k_start, k_length, row, h)
                if K_NORM != NONE:
                    at = ((item * H + h) * GROUPS + g) * BLOCK
                    load_tile(sizes_in, [at], own_full.index(g), size_tiles.index(g))
            turn += 1
            first_rows = (item - tile) * H + h  # of the segment's first item
            for j in range(gl.maximum(gl.cdiv(q_length, BLOCK), 2)):
                s = step % STAGES
                at = ((first_rows + j // GROUPS * H) * GROUPS + j % GROUPS) * 2 * BLOCK
                mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), BYTES + 2 * BLOCK * 4)
                load_parts(u_in, u_tiles, s, full.index(s), q_start, q_length, j * BLOCK, h)
                load_tile(rows_in, [at], full.index(s), lse_tiles.index(s))
                load_parts(dout_in, dout_tiles, s, full.index(s), q_start, q_length, j * BLOCK, h)
                load_tile(rows_in, [at + BLOCK], full.index(s), delta_tiles.index(s))
                step += 1


@gluon.jit
def keys_owner(
    GROUP: gl.constexpr, dk_out, dv_out, items_ptr, first_item, work, tokens, tokens_k, k_tiles, v_tiles, size_tiles,
    u_tiles, dout_tiles, lse_tiles, delta_tiles, out_tiles, own_full, own_empty, full, empty, score_scale, key_factor,
    k_eps, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, K_NORM: gl.constexpr, FOLD: gl.constexpr,
    STAGES: gl.constexpr, HOLD: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    TILE_ROWS: gl.constexpr = BLOCK * GROUPS
    PARTS: gl.constexpr = 2 if D2 else 1
    DTYPE: gl.constexpr = k_tiles[0].dtype
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 or 16, 16])
    layouts: gl.constexpr = (mma_1, mma_2)
    left: gl.constexpr = gl.DotOperandLayout(0, mma_1, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, mma_1)
    of_col: gl.constexpr = gl.SliceLayout(0, mma_1)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, mma_1)
    step = 0
    turn = 0
    following = read_item(items_ptr, first_item, gl.program_id(0), work, H, tokens, tokens_k)
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        h = w % H
        _, q_length, k_start, k_length, tile = following
        following = read_item(items_ptr, first_item, w + gl.num_programs(0), work, H, tokens, tokens_k)
        if tile * TILE_ROWS < k_length:
            row = tile * TILE_ROWS + GROUP * BLOCK
            blocks = gl.maximum(gl.cdiv(q_length, BLOCK), 2)
            mbarrier.wait(own_full.index(GROUP), turn & 1)
            if row < k_length:
                k = left_operand(matrix(k_tiles, GROUP, BLOCK, D2), layouts, HOLD)
                v = left_operand(matrix(v_tiles, GROUP, BLOCK, D2), layouts, HOLD)
                if K_NORM != NONE:
                    scale = size_tiles.index(GROUP).load(of_row)
                else:
                    scale = gl.full([BLOCK], 1.0, gl.float32, of_row)
                if not FOLD:
                    scale = scale * score_scale
                if HOLD:
                    mbarrier.arrive(own_empty.index(GROUP), count=1)
                dv = zeros(layouts, D2)
                a = zeros(layouts, D2)

                if DEPTH == 2:
                    # the first block, and the scores of the second
                    s = step % STAGES
                    s_next = (step + 1) % STAGES
                    u = matrix(u_tiles, s, BLOCK, D2)
                    dout = matrix(dout_tiles, s, BLOCK, D2)
                    mbarrier.wait(full.index(s), (step // STAGES) & 1)
                    s_now = start_scores(k, u, zero)
                    dp_now = start_scores(v, dout, zero)
                    mbarrier.wait(full.index(s_next), ((step + 1) // STAGES) & 1)
                    s_new = start_scores(k, matrix(u_tiles, s_next, BLOCK, D2), zero)
                    lse = lse_tiles.index(s).load(of_col)
                    s_now = warpgroup_mma_wait(2 * PARTS, deps=[s_now])
                    p = narrow(gl.exp2(s_now * scale[:, None] - lse[None, :]), DTYPE, left)
                    dv_now = start_adding(p, dout, dv)
                    delta = delta_tiles.index(s).load(of_col)
                    dp_now, p = warpgroup_mma_wait(2 * PARTS, deps=[dp_now, p])
                    p_32 = widen(gl.convert_layout(p, mma_1))
                    g = narrow(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                    mbarrier.wait(full.index(s_next), ((step + 1) // STAGES) & 1)
                    s_now, dv, g = finish(s_new, dv_now, g)
                    for _ in range(2, blocks):
                        step += 1
                        s_old = s
                        u_old = u
                        s = s_next
                        s_next = (step + 1) % STAGES
                        phase = ((step + 1) // STAGES) & 1
                        u = matrix(u_tiles, s, BLOCK, D2)
                        dout = matrix(dout_tiles, s, BLOCK, D2)
                        mbarrier.wait(full.index(s_next), phase)
                        dp_now = start_scores(v, dout, zero)
                        s_new = start_scores(k, matrix(u_tiles, s_next, BLOCK, D2), zero)
                        a_now = start_adding(g, u_old, a)
                        lse = lse_tiles.index(s).load(of_col)
                        p = narrow(gl.exp2(s_now * scale[:, None] - lse[None, :]), DTYPE, left)
                        dv_now = start_adding(p, dout, dv)
                        delta = delta_tiles.index(s).load(of_col)
                        mbarrier.wait(full.index(s_next), phase)
                        dp_now, p = warpgroup_mma_wait(3 * PARTS, deps=[dp_now, p])
                        p_32 = widen(gl.convert_layout(p, mma_1))
                        g_new = narrow(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                        mbarrier.wait(full.index(s_next), phase)
                        s_now, a, dv, g = finish_three(s_new, a_now, dv_now, g_new)
                        mbarrier.arrive(empty.index(s_old), count=1)
                    # the last block
                    step += 1
                    phase = (step // STAGES) & 1
                    u_old = u
                    u = matrix(u_tiles, s_next, BLOCK, D2)
                    dout = matrix(dout_tiles, s_next, BLOCK, D2)
                    dp_now = start_scores(v, dout, zero)
                    a_now = start_adding(g, u_old, a)
                    lse = lse_tiles.index(s_next).load(of_col)
                    p = narrow(gl.exp2(s_now * scale[:, None] - lse[None, :]), DTYPE, left)
                    dv_now = start_adding(p, dout, dv)
                    delta = delta_tiles.index(s_next).load(of_col)
                    mbarrier.wait(full.index(s_next), phase)
                    dp_now, p = warpgroup_mma_wait(2 * PARTS, deps=[dp_now, p])
                    p_32 = widen(gl.convert_layout(p, mma_1))
                    g_new = narrow(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                    mbarrier.wait(full.index(s_next), phase)
                    dv, a, g = finish_two(dv_now, a_now, g_new)
                    mbarrier.arrive(empty.index(s), count=1)
                    a = wait_for(start_adding(g, u, a), 0)
                    mbarrier.arrive(empty.index(s_next), count=1)
                    step += 1
                elif DEPTH == 0:
                    for _ in range(blocks):
                        s = step % STAGES
                        phase = (step // STAGES) & 1
                        u = matrix(u_tiles, s, BLOCK, D2)
                        dout = matrix(dout_tiles, s, BLOCK, D2)
                        mbarrier.wait(full.index(s), phase)
                        s_now = start_scores(k, u, zero)
                        dp_now = start_scores(v, dout, zero)
                        lse = lse_tiles.index(s).load(of_col)
                        s_now = warpgroup_mma_wait(PARTS, deps=[s_now])
                        p = narrow(gl.exp2(s_now * scale[:, None] - lse[None, :]), DTYPE, left)
                        dv_now = start_adding(p, dout, dv)
                        delta = delta_tiles.index(s).load(of_col)
                        mbarrier.wait(full.index(s), phase)
                        dp_now, p = warpgroup_mma_wait(PARTS, deps=[dp_now, p])
                        p_32 = widen(gl.convert_layout(p, mma_1))
                        g = narrow(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                        a_now = start_adding(g, u, a)
                        dv, a, g = finish_two(dv_now, a_now, g)
                        mbarrier.arrive(empty.index(s), count=1)
                        step += 1
                else:
                    s = step % STAGES
                    phase = (step // STAGES) & 1
                    u = matrix(u_tiles, s, BLOCK, D2)
                    dout = matrix(dout_tiles, s, BLOCK, D2)
                    mbarrier.wait(full.index(s), phase)
                    s_now = start_scores(k, u, zero)
                    dp_now = start_scores(v, dout, zero)
                    lse = lse_tiles.index(s).load(of_col)
                    s_now = warpgroup_mma_wait(PARTS, deps=[s_now])
                    p_32 = gl.exp2(s_now * scale[:, None] - lse[None, :])
                    p = narrow(p_32, DTYPE, left)
                    delta = delta_tiles.index(s).load(of_col)
                    dp_now = warpgroup_mma_wait(0, deps=[dp_now])
                    g = narrow(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                    for _ in range(1, blocks):
                        s_old = s
                        u_old = u
                        dout_old = dout
                        step += 1
                        s = step % STAGES
                        phase = (step // STAGES) & 1
                        u = matrix(u_tiles, s, BLOCK, D2)
                        dout = matrix(dout_tiles, s, BLOCK, D2)
                        mbarrier.wait(full.index(s), phase)
                        s_now = start_scores(k, u, zero)
                        dp_now = start_scores(v, dout, zero)
                        dv_now = start_adding(p, dout_old, dv)
                        a_now = start_adding(g, u_old, a)
                        lse = lse_tiles.index(s).load(of_col)
                        s_now = warpgroup_mma_wait(3 * PARTS, deps=[s_now])
                        p_32 = gl.exp2(s_now * scale[:, None] - lse[None, :])
                        p_new = narrow(p_32, DTYPE, left)
                        delta = delta_tiles.index(s).load(of_col)
                        # p_32 is a dep of the wait, and a wait for what has long come stands before it: the compiler
                        # moves the softmax over neither
                        mbarrier.wait(full.index(s), phase)
                        dp_now, p_32 = warpgroup_mma_wait(2 * PARTS, deps=[dp_now, p_32])
                        g_new = narrow(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                        mbarrier.wait(full.index(s), phase)
                        dv, a, g_new = finish_two(dv_now, a_now, g_new)
                        mbarrier.arrive(empty.index(s_old), count=1)
                        p = p_new
                        g = g_new
                    dv_now = start_adding(p, dout, dv)
                    a_now = start_adding(g, u, a)
                    dv, a, g = finish_two(dv_now, a_now, g)
                    mbarrier.arrive(empty.index(s), count=1)
                    step += 1

                tma.store_wait(0)
                write(matrix(out_tiles, GROUP * 2, BLOCK, D2), dv)
                store_parts(dv_out, out_tiles, GROUP * 2, k_start, k_length, row, h)
                if HOLD:
                    k_hat = widen_operand(k, layouts)
                else:
                    k_hat = read(k, layouts)
                    mbarrier.arrive(own_empty.index(GROUP), count=1)
                r, offset = row_statistics(k_hat, k_eps, K_NORM, D)
                if K_NORM != NONE:
                    k_hat = affine_rows(k_hat, r, offset, D)
                write(
                    matrix(out_tiles, GROUP * 2 + 1, BLOCK, D2),
                    unit_rows_backward(a, k_hat, r, key_factor, k_eps, K_NORM, D),
                )
                store_parts(dk_out, out_tiles, GROUP * 2 + 1, k_start, k_length, row, h)
            else:  # rows past the end alone
                mbarrier.arrive(own_empty.index(GROUP), count=1)
                step = pass_by(full, empty, step, blocks, STAGES)
            turn += 1
    tma.store_wait(0)


@gluon.jit
def widen_operand(x, layouts):
    """A left operand in float32, where the accumulators have it."""
    first = widen(gl.convert_layout(x[0], layouts[0]))
    if len(x) == 1:
        return (first,)
    else:
        return (first, widen(gl.convert_layout(x[1], layouts[1])))


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def hopper_keys(
    k_1, v_1, u_1, dout_1, dk_1, dv_1, k_2, v_2, u_2, dout_2, dk_2, dv_2, rows_in, sizes_in, items_ptr, offsets_ptr,
    first_item, items, tokens, tokens_k, score_scale, key_factor, k_eps, H: gl.constexpr, D: gl.constexpr,
    D2: gl.constexpr, K_NORM: gl.constexpr, FOLD: gl.constexpr, CLASS: gl.constexpr, ON_DEVICE: gl.constexpr,
    STAGES: gl.constexpr, HOLD: gl.constexpr, DEPTH: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    if ON_DEVICE:
        first_item = gl.load(offsets_ptr + CLASS)
        items = gl.load(offsets_ptr + CLASS + 1) - first_item
    work = items * H
    k_tiles = tiles_of(k_1, k_2, GROUPS, D2)
    v_tiles = tiles_of(k_1, k_2, GROUPS, D2)
    out_tiles = tiles_of(k_1, k_2, 2 * GROUPS, D2)
    u_tiles = tiles_of(k_1, k_2, STAGES, D2)
    dout_tiles = tiles_of(k_1, k_2, STAGES, D2)
    size_tiles = gl.allocate_shared_memory(gl.float32, [GROUPS, BLOCK], sizes_in.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], rows_in.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], rows_in.layout)
    own_full, own_empty = barriers(GROUPS, 1), barriers(GROUPS, 1)
    full, empty = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    fence_async_shared()
    k_in, v_in = column_parts(k_1, k_2, D2), column_parts(v_1, v_2, D2)
    u_in, dout_in = column_parts(u_1, u_2, D2), column_parts(dout_1, dout_2, D2)
    dk_out, dv_out = column_parts(dk_1, dk_2, D2), column_parts(dv_1, dv_2, D2)
    # the tuples stand in the call: held in a variable, one would turn its constexprs into tensors
    gl.warp_specialize(
        [
            (keys_owner, (
                0, dk_out, dv_out, items_ptr, first_item, work, tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles,
                dout_tiles, lse_tiles, delta_tiles, out_tiles, own_full, own_empty, full, empty, score_scale,
                key_factor, k_eps, H, D, D2, K_NORM, FOLD, STAGES, HOLD, DEPTH,
            )),
            (keys_owner, (
                1, dk_out, dv_out, items_ptr, first_item, work, tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles,
                dout_tiles, lse_tiles, delta_tiles, out_tiles, own_full, own_empty, full, empty, score_scale,
                key_factor, k_eps, H, D, D2, K_NORM, FOLD, STAGES, HOLD, DEPTH,
            )),
            (keys_loader, (
                k_in, v_in, u_in, dout_in, rows_in, sizes_in, items_ptr, first_item, work, tokens, tokens_k, k_tiles,
                v_tiles, size_tiles, u_tiles, dout_tiles, lse_tiles, delta_tiles, own_full, own_empty, full, empty, H,
                D2, K_NORM, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# ---- programs that own queries


@gluon.jit
def column_sizes(size_tiles, i, LAYOUT: gl.constexpr, K_NORM: gl.constexpr):
    if K_NORM != NONE:
        return size_tiles.index(i).load(LAYOUT)
    else:
        return gl.full([BLOCK], 1.0, gl.float32, LAYOUT)


@gluon.jit
def scaled(scores, score_scale, FOLD: gl.constexpr):
    if FOLD:
        return scores
    else:
        return scores * score_scale


@gluon.jit
def weights_of(scores, r, lse, K_NORM: gl.constexpr):
    """P of a block."""
    if K_NORM != NONE:
        scores = scores * r[None, :]
    return gl.exp2(scores - lse[:, None])


@gluon.jit
def score_gradient(p, dp, delta, r, K_NORM: gl.constexpr):
    """G · diag(r) of a block."""
    g = p * (dp - delta[:, None])
    if K_NORM != NONE:
        g = g * r[None, :]
    return g


@gluon.jit
def queries_loader(
    k_in, v_in, u_in, dout_in, q_in, rows_in, sizes_in, items_ptr, first_item, work, tokens, tokens_k, k_tiles,
    v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, own_full, own_empty, q_full, q_empty, full, empty,
    H: gl.constexpr, D2: gl.constexpr, K_NORM: gl.constexpr, NEEDS_Q: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = 2 * BLOCK * (PART + D2) * 2
    SIZE_BYTES: gl.constexpr = BLOCK * 4 if K_NORM != NONE else 0
    TILE_ROWS: gl.constexpr = BLOCK * GROUPS
    step = 0
    turn = 0
    following = read_item(items_ptr, first_item, gl.program_id(0), work, H, tokens, tokens_k)
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item = w // H
        h = w % H
        q_start, q_length, k_start, k_length, tile = following
        following = read_item(items_ptr, first_item, w + gl.num_programs(0), work, H, tokens, tokens_k)
        if tile * TILE_ROWS < q_length:
            for g in gl.static_range(GROUPS):
                row = tile * TILE_ROWS + g * BLOCK
                mbarrier.wait(own_empty.index(g), (turn & 1) ^ 1)
                mbarrier.expect(own_full.index(g), BYTES + 2 * BLOCK * 4)
                load_parts(u_in, u_tiles, g, own_full.index(g), q_start, q_length, row, h)
                load_parts(dout_in, dout_tiles, g, own_full.index(g), q_start, q_length, row, h)
                for i in gl.static_range(2):
                    at = (((item * H + h) * GROUPS + g) * 2 + i) * BLOCK
                    load_tile(rows_in, [at], own_full.index(g), row_tiles.index(2 * g + i))
            first_sizes = (item - tile) * H + h
            blocks = gl.maximum(gl.cdiv(k_length, BLOCK), 2)
            for j in range(blocks):
                block = gl.where(j == 0, blocks, j) - 1
                s = step % STAGES
                mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), BYTES + SIZE_BYTES)
                load_parts(k_in, k_tiles, s, full.index(s), k_start, k_length, block * BLOCK, h)
                if K_NORM != NONE:
                    at = ((first_sizes + block // GROUPS * H) * GROUPS + block % GROUPS) * BLOCK
                    load_tile(sizes_in, [at], full.index(s), size_tiles.index(s))
                load_parts(v_in, v_tiles, s, full.index(s), k_start, k_length, block * BLOCK, h)
                step += 1
            if NEEDS_Q:
                for g in gl.static_range(GROUPS):
                    row = tile * TILE_ROWS + g * BLOCK
                    mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(g), BYTES // 2)
                    load_parts(q_in, q_tiles, g, q_full.index(g), q_start, q_length, row, h)
            turn += 1


@gluon.jit
def queries_owner(
    GROUP: gl.constexpr, dq_out, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item, work,
    tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, scratch, own_full,
    own_empty, q_full, q_empty, full, empty, score_scale, softmax_scale, q_eps, q_weight_stride: gl.constexpr,
    q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr,
    Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr,
    FOLD: gl.constexpr, WEIGHT_GRADS: gl.constexpr, NEEDS_Q: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
    HOLD: gl.constexpr,
):  # fmt: skip
    TILE_ROWS: gl.constexpr = BLOCK * GROUPS
    PARTS: gl.constexpr = 2 if D2 else 1
    DTYPE: gl.constexpr = k_tiles[0].dtype
    GAIN: gl.constexpr = Q_WEIGHT or K_WEIGHT
    mma_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    mma_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 or 16, 16])
    layouts: gl.constexpr = (mma_1, mma_2)
    left: gl.constexpr = gl.DotOperandLayout(0, mma_1, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, mma_1)
    of_col: gl.constexpr = gl.SliceLayout(0, mma_1)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, mma_1)
    step = 0
    turn = 0
    following = read_item(items_ptr, first_item, gl.program_id(0), work, H, tokens, tokens_k)
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item = w // H
        h = w % H
        q_start, q_length, _, k_length, tile = following
        following = read_item(items_ptr, first_item, w + gl.num_programs(0), work, H, tokens, tokens_k)
        if tile * TILE_ROWS < q_length:
            row = tile * TILE_ROWS + GROUP * BLOCK
            blocks = gl.maximum(gl.cdiv(k_length, BLOCK), 2)
            mbarrier.wait(own_full.index(GROUP), turn & 1)
            tma.store_wait(0)
            if NEEDS_Q:
                mbarrier.arrive(q_empty.index(GROUP), count=1, pred=turn > 0)
            if row < q_length:
                u = left_operand(matrix(u_tiles, GROUP, BLOCK, D2), layouts, HOLD)
                dout = left_operand(matrix(dout_tiles, GROUP, BLOCK, D2), layouts, HOLD)
                lse = row_tiles.index(2 * GROUP).load(of_row)
                delta = row_tiles.index(2 * GROUP + 1).load(of_row)
                if HOLD:
                    mbarrier.arrive(own_empty.index(GROUP), count=1)
                du = zeros(layouts, D2)

                # the first block, and the scores of the second; each may run past the last key
                s = step % STAGES
                s_next = (step + 1) % STAGES
                k = matrix(k_tiles, s, BLOCK, D2)
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                s_now = start_scores(u, k, zero)
                dp_now = start_scores(dout, matrix(v_tiles, s, BLOCK, D2), zero)
                mbarrier.wait(full.index(s_next), ((step + 1) // STAGES) & 1)
                s_new = start_scores(u, matrix(k_tiles, s_next, BLOCK, D2), zero)
                s_now = scaled(warpgroup_mma_wait(2 * PARTS, deps=[s_now]), score_scale, FOLD)
                cols = gl.arange(0, BLOCK, of_col)
                s_now = gl.where(((blocks - 1) * BLOCK + cols < k_length)[None, :], s_now, -float("inf"))
                r = column_sizes(size_tiles, s, of_col, K_NORM)
                p = weights_of(s_now, r, lse, K_NORM)
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                dp_now, p = warpgroup_mma_wait(PARTS, deps=[dp_now, p])
                g = narrow(score_gradient(p, dp_now, delta, r, K_NORM), DTYPE, left)
                s_now = scaled(warpgroup_mma_wait(0, deps=[s_new]), score_scale, FOLD)
                s_now = gl.where((cols < k_length)[None, :], s_now, -float("inf"))
                for _ in range(2, blocks):
                    step += 1
                    s_old = s
                    k_old = k
                    s = s_next
                    s_next = (step + 1) % STAGES
                    phase = ((step + 1) // STAGES) & 1
                    k = matrix(k_tiles, s, BLOCK, D2)
                    mbarrier.wait(full.index(s_next), phase)
                    dp_now = start_scores(dout, matrix(v_tiles, s, BLOCK, D2), zero)
                    s_new = start_scores(u, matrix(k_tiles, s_next, BLOCK, D2), zero)
                    du_now = start_adding(g, k_old, du)
                    r = column_sizes(size_tiles, s, of_col, K_NORM)
                    p = weights_of(s_now, r, lse, K_NORM)
                    # p is a dep of the wait, and a wait for what has long come stands before it: the compiler moves the
                    # softmax over neither
                    mbarrier.wait(full.index(s_next), phase)
                    dp_now, p = warpgroup_mma_wait(2 * PARTS, deps=[dp_now, p])
                    g_new = narrow(score_gradient(p, dp_now, delta, r, K_NORM), DTYPE, left)
                    mbarrier.wait(full.index(s_next), phase)
                    s_now, du, g = finish(s_new, du_now, g_new)
                    s_now = scaled(s_now, score_scale, FOLD)
                    mbarrier.arrive(empty.index(s_old), count=1)
                # the last block
                step += 1
                phase = (step // STAGES) & 1
                dp_now = start_scores(dout, matrix(v_tiles, s_next, BLOCK, D2), zero)
                du_now = start_adding(g, k, du)
                r = column_sizes(size_tiles, s_next, of_col, K_NORM)
                p = weights_of(s_now, r, lse, K_NORM)
                mbarrier.wait(full.index(s_next), phase)
                dp_now, p = warpgroup_mma_wait(PARTS, deps=[dp_now, p])
                g_new = narrow(score_gradient(p, dp_now, delta, r, K_NORM), DTYPE, left)
                mbarrier.wait(full.index(s_next), phase)
                p, du, g = finish(p, du_now, g_new)
                mbarrier.arrive(empty.index(s), count=1)
                du = wait_for(start_adding(g, matrix(k_tiles, s_next, BLOCK, D2), du), 0)
                mbarrier.arrive(empty.index(s_next), count=1)
                step += 1

                if K_NORM == LAYER_NORM:
                    one = gl.full([BLOCK], 1.0, gl.float32, of_row)
                    du = affine_rows(du, one, row_sum(du) * (-1.0 / D), D)
                dq_hat = du
                if GAIN:
                    k_weight = load_vector(k_weight_ptr + h * k_weight_stride, K_WEIGHT, 1.0, layouts, D, D2)
                    q_weight = load_vector(q_weight_ptr + h * q_weight_stride, Q_WEIGHT, 1.0, layouts, D, D2)
                    dq_hat = scale_columns(du, multiply(q_weight, k_weight))
                tile_q = matrix(q_tiles, GROUP, BLOCK, D2)
                if NEEDS_Q:
                    mbarrier.wait(q_full.index(GROUP), turn & 1)
                    q_hat = read(tile_q, layouts)
                    q_r, q_offset = row_statistics(q_hat, q_eps, Q_NORM, D)
                    if Q_NORM != NONE:
                        q_hat = affine_rows(q_hat, q_r, q_offset, D)
                    write(tile_q, unit_rows_backward(dq_hat, q_hat, q_r, softmax_scale, q_eps, Q_NORM, D))
                else:
                    write(tile_q, scale_all(dq_hat, softmax_scale))
                store_parts(dq_out, q_tiles, GROUP, q_start, q_length, row, h)
                if WEIGHT_GRADS:
                    partial = ((first_item + item) * SPLITS + GROUP).to(gl.int64)
                    base = partials_ptr + (partial * H + h) * (D * (1 + Q_BIAS))
                    memory = scratch.index(GROUP)
                    for c in gl.static_range(PARTS):
                        store_column_sums(base + c * PART, du[c] * q_hat[c], softmax_scale, memory, D - c * PART, 4)
                        if Q_BIAS:
                            store_column_sums(base + D + c * PART, du[c], softmax_scale, memory, D - c * PART, 4)
                if not HOLD:
                    fence_async_shared()  # the sums were written where TMA loads next
                    mbarrier.arrive(own_empty.index(GROUP), count=1)
            else:  # rows past the end alone
                mbarrier.arrive(own_empty.index(GROUP), count=1)
                step = pass_by(full, empty, step, blocks, STAGES)
                if NEEDS_Q:
                    mbarrier.wait(q_full.index(GROUP), turn & 1)
            turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def hopper_queries(
    k_1, v_1, q_1, dout_1, dq_1, k_2, v_2, q_2, dout_2, dq_2, rows_in, sizes_in, partials_ptr, q_weight_ptr,
    q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k,
    q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, score_scale,
    softmax_scale, q_eps, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr,
    K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr,
    WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr, ON_DEVICE: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, HOLD: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    NEEDS_Q: gl.constexpr = Q_NORM != NONE or WEIGHT_GRADS
    if ON_DEVICE:
        first_item = gl.load(offsets_ptr + CLASS)
        items = gl.load(offsets_ptr + CLASS + 1) - first_item
    work = items * H
    u_tiles = tiles_of(k_1, k_2, GROUPS, D2)
    dout_tiles = tiles_of(k_1, k_2, GROUPS, D2)
    q_tiles = tiles_of(k_1, k_2, GROUPS, D2)
    k_tiles = tiles_of(k_1, k_2, STAGES, D2)
    v_tiles = tiles_of(k_1, k_2, STAGES, D2)
    size_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], sizes_in.layout)
    row_tiles = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, BLOCK], rows_in.layout)
    if HOLD:
        scratch = gl.allocate_shared_memory(gl.float32, [GROUPS, 4, PART], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    else:
        scratch = u_tiles[0]  # no longer read when it is needed
    own_full, own_empty = barriers(GROUPS, 1), barriers(GROUPS, 1)
    q_full, q_empty = barriers(GROUPS, 1), barriers(GROUPS, 1)
    full, empty = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    fence_async_shared()
    k_in, v_in = column_parts(k_1, k_2, D2), column_parts(v_1, v_2, D2)
    q_in, dout_in = column_parts(q_1, q_2, D2), column_parts(dout_1, dout_2, D2)
    dq = column_parts(dq_1, dq_2, D2)  # holds u at first
    gl.warp_specialize(
        [
            (queries_owner, (
                0, dq, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item, work, tokens,
                tokens_k, k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, scratch,
                own_full, own_empty, q_full, q_empty, full, empty, score_scale, softmax_scale, q_eps, q_weight_stride,
                q_bias_stride, k_weight_stride, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD,
                WEIGHT_GRADS, NEEDS_Q, SPLITS, STAGES, HOLD,
            )),
            (queries_owner, (
                1, dq, partials_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item, work, tokens,
                tokens_k, k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, scratch,
                own_full, own_empty, q_full, q_empty, full, empty, score_scale, softmax_scale, q_eps, q_weight_stride,
                q_bias_stride, k_weight_stride, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD,
                WEIGHT_GRADS, NEEDS_Q, SPLITS, STAGES, HOLD,
            )),
            (queries_loader, (
                k_in, v_in, dq, dout_in, q_in, rows_in, sizes_in, items_ptr, first_item, work, tokens, tokens_k,
                k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, own_full, own_empty, q_full,
                q_empty, full, empty, H, D2, K_NORM, NEEDS_Q, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


HOLDS = (  # up to a width: whether hopper_keys' and hopper_queries' own rows fit registers; hopper_keys' DEPTH
    (64, (True, True), 1),
    (80, (False, True), 1),
    (128, (False, False), 0),
)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def numbers(x: Tensor) -> TensorDescriptor:
    """Loads BLOCK float32 numbers."""
    return TensorDescriptor(x, [x.numel()], [1], [BLOCK.value], shared_layout(0, 1, 32))


def backward_stream(
    call: Any, index: int, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, rows: Tensor, sizes: Tensor,
    partials: Tensor, splits: int, weight_grads: bool, *, stages: tuple[int, int],
    hold: tuple[bool, bool] | None = None, depth: int | None = None, registers: int = 240,
) -> None:  # fmt: skip
    """dk and dv, then dq over u. rows and sizes are backward_prepare's; stages those of hopper_keys and of
    hopper_queries. What else there is to choose is a matter of registers, which a head's width takes (HOLDS)."""
    norms = call.norms
    if hold is None or depth is None:
        hold, depth = next(choice for width, *choice in HOLDS if call.width <= width)
    first, second = parts(max(call.width, PART.value))
    tensors = dict(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq, dk=dk, dv=dv)
    halves = {f"{name}_1": ragged(x, BLOCK.value, first) for name, x in tensors.items()}
    halves |= {f"{name}_2": ragged(x, BLOCK.value, second) if second else None for name, x in tensors.items()}

    def descriptors(*names: str) -> dict:
        return {f"{name}_{c}": halves[f"{name}_{c}"] for c in (1, 2) for name in names}

    items = call.items_of(index)
    grid = (min(items * call.heads, multiprocessors(call.q.device)),)
    common = dict(
        **call.work(index), items=items, score_scale=call.score_scale, H=call.heads, D=call.width, D2=second,
        K_NORM=norms.k_kind, FOLD=call.fold, REGISTERS=registers, num_warps=4,
    )  # fmt: skip
    launch_kernel(
        hopper_keys, grid,
        **descriptors("k", "v", "dout", "dk", "dv"), u_1=halves["dq_1"], u_2=halves["dq_2"], rows_in=numbers(rows),
        sizes_in=numbers(sizes), key_factor=call.key_factor, k_eps=norms.k_eps, STAGES=stages[0], HOLD=hold[0],
        DEPTH=depth, **common,
    )  # fmt: skip
    launch_kernel(
        hopper_queries, grid,
        **descriptors("k", "v", "q", "dout", "dq"), rows_in=numbers(rows), sizes_in=numbers(sizes),
        partials_ptr=partials, softmax_scale=call.softmax_scale, q_eps=norms.q_eps, **call.weights(),
        Q_NORM=norms.q_kind, WEIGHT_GRADS=weight_grads, SPLITS=splits, STAGES=stages[1], HOLD=hold[1], **common,
    )  # fmt: skip
