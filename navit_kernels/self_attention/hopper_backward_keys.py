"""Hopper's backward of long segments: the programs that own keys; see hopper_backward.py."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .hopper_steps import PART, items_of_class, load_tile
from .hopper_stream_steps import (
    BLOCK,
    GROUPS,
    barriers,
    kept,
    left_operand,
    pass_by,
    read_item,
    tiles_of,
    zeros,
)
from .hopper_tile_steps import (
    affine_rows,
    block_boundary,
    column_parts,
    from_operands,
    load_block,
    matrix,
    operand,
    read,
    row_statistics,
    start_adding,
    start_scores,
    store_block,
    unit_rows_backward,
    widen,
    write,
)
from .steps import NONE


@gluon.jit
def finish(x, y, held):
    """Two products, once they are there, and `held`, computed meanwhile."""
    if len(x) == 1:
        x_1, y_1, held = warpgroup_mma_wait(0, deps=[x[0], y[0], held])
        return (x_1,), (y_1,), held
    else:
        x_1, x_2, y_1, y_2, held = warpgroup_mma_wait(0, deps=[x[0], x[1], y[0], y[1], held])
        return (x_1, x_2), (y_1, y_2), held


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
                load_block(k_in, k_tiles, g, own_full.index(g), k_start, k_length, row, h)
                load_block(v_in, v_tiles, g, own_full.index(g), k_start, k_length, row, h)
                if K_NORM != NONE:
                    at = ((item * H + h) * GROUPS + g) * BLOCK
                    load_tile(sizes_in, [at], own_full.index(g), size_tiles.index(g))
            turn += 1
            first_rows = (item - tile) * H + h  # of the segment's first item
            for j in range(gl.maximum(gl.cdiv(q_length, BLOCK), 1)):
                s = step % STAGES
                at = ((first_rows + j // GROUPS * H) * GROUPS + j % GROUPS) * 2 * BLOCK
                mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), BYTES + 2 * BLOCK * 4)
                load_block(u_in, u_tiles, s, full.index(s), q_start, q_length, j * BLOCK, h)
                load_tile(rows_in, [at], full.index(s), lse_tiles.index(s))
                load_block(dout_in, dout_tiles, s, full.index(s), q_start, q_length, j * BLOCK, h)
                load_tile(rows_in, [at + BLOCK], full.index(s), delta_tiles.index(s))
                step += 1


@gluon.jit
def keys_owner(
    GROUP: gl.constexpr, dk_out, dv_out, items_ptr, first_item, work, tokens, tokens_k, k_tiles, v_tiles, size_tiles,
    u_tiles, dout_tiles, lse_tiles, delta_tiles, out_tiles, own_full, own_empty, full, empty, score_scale, key_factor,
    k_eps, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, K_NORM: gl.constexpr, FOLD: gl.constexpr,
    STAGES: gl.constexpr, HOLD: gl.constexpr, OVERLAP: gl.constexpr,
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
            blocks = kept(gl.maximum(gl.cdiv(q_length, BLOCK), 1))
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

                if OVERLAP:
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
                    p = operand(p_32, DTYPE, left)
                    delta = delta_tiles.index(s).load(of_col)
                    dp_now = warpgroup_mma_wait(0, deps=[dp_now])
                    g = operand(p_32 * (dp_now - delta[None, :]), DTYPE, left)
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
                        p_new = operand(p_32, DTYPE, left)
                        delta = delta_tiles.index(s).load(of_col)
                        block_boundary()  # and p_32 as a dep of the wait: the compiler moves the softmax over neither
                        dp_now, p_32 = warpgroup_mma_wait(2 * PARTS, deps=[dp_now, p_32])
                        g_new = operand(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                        block_boundary()
                        dv, a, g_new = finish(dv_now, a_now, g_new)
                        mbarrier.arrive(empty.index(s_old), count=1)
                        p = p_new
                        g = g_new
                    dv_now = start_adding(p, dout, dv)
                    a_now = start_adding(g, u, a)
                    dv, a, g = finish(dv_now, a_now, g)
                    mbarrier.arrive(empty.index(s), count=1)
                    step += 1
                else:
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
                        p = operand(gl.exp2(s_now * scale[:, None] - lse[None, :]), DTYPE, left)
                        dv_now = start_adding(p, dout, dv)
                        delta = delta_tiles.index(s).load(of_col)
                        block_boundary()
                        dp_now, p = warpgroup_mma_wait(PARTS, deps=[dp_now, p])
                        p_32 = widen(gl.convert_layout(p, mma_1))
                        g = operand(p_32 * (dp_now - delta[None, :]), DTYPE, left)
                        a_now = start_adding(g, u, a)
                        dv, a, g = finish(dv_now, a_now, g)
                        mbarrier.arrive(empty.index(s), count=1)
                        step += 1

                tma.store_wait(0)
                write(matrix(out_tiles, GROUP * 2, BLOCK, D2), dv)
                store_block(dv_out, out_tiles, GROUP * 2, k_start, k_length, row, h)
                if HOLD:
                    k_hat = from_operands(k, layouts)
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
                store_block(dk_out, out_tiles, GROUP * 2 + 1, k_start, k_length, row, h)
            else:  # rows past the end alone
                mbarrier.arrive(own_empty.index(GROUP), count=1)
                step = pass_by(full, empty, step, blocks, STAGES)
            turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k"])
def hopper_keys(
    k_1, v_1, u_1, dout_1, dk_1, dv_1, k_2, v_2, u_2, dout_2, dk_2, dv_2, rows_in, sizes_in, items_ptr, offsets_ptr,
    first_item, items, tokens, tokens_k, score_scale, key_factor, k_eps, H: gl.constexpr, D: gl.constexpr,
    D2: gl.constexpr, K_NORM: gl.constexpr, FOLD: gl.constexpr, CLASS: gl.constexpr,
    STAGES: gl.constexpr, HOLD: gl.constexpr, OVERLAP: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    first_item, items = items_of_class(offsets_ptr, first_item, items, CLASS)
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
                key_factor, k_eps, H, D, D2, K_NORM, FOLD, STAGES, HOLD, OVERLAP,
            )),
            (keys_owner, (
                1, dk_out, dv_out, items_ptr, first_item, work, tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles,
                dout_tiles, lse_tiles, delta_tiles, out_tiles, own_full, own_empty, full, empty, score_scale,
                key_factor, k_eps, H, D, D2, K_NORM, FOLD, STAGES, HOLD, OVERLAP,
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
