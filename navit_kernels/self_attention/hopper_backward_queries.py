"""Hopper's backward of long segments: the programs that own queries; see hopper_backward.py."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .hopper_steps import PART, items_of_class, load_tile
from .hopper_stream_steps import (
    BLOCK,
    GROUPS,
    barriers,
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
    load_block,
    load_vector,
    matrix,
    multiply,
    operand,
    read,
    row_statistics,
    row_sum,
    scale_all,
    scale_columns,
    start_adding,
    start_scores,
    store_block,
    store_column_sums,
    unit_rows_backward,
    wait_for,
    write,
)
from .steps import LAYER_NORM, NONE


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
def finish(scores, product, held):
    """All that is under way, once it is there, and `held`, computed meanwhile."""
    if len(product) == 1:
        scores, first, held = warpgroup_mma_wait(0, deps=[scores, product[0], held])
        return scores, (first,), held
    else:
        scores, first, second, held = warpgroup_mma_wait(0, deps=[scores, product[0], product[1], held])
        return scores, (first, second), held


@gluon.jit
def queries_step(
    s_now, g, du, u, dout, lse, delta, zero, k_tiles, v_tiles, size_tiles, full, empty, score_scale, step,
    K_NORM: gl.constexpr, FOLD: gl.constexpr, D2: gl.constexpr, STAGES: gl.constexpr, left: gl.constexpr,
):  # fmt: skip
    """The softmax of block `step`, whose scores are there; meanwhile its dP, the scores of the next block and the last
    one's part of du."""
    PARTS: gl.constexpr = 2 if D2 else 1
    s_old = (step - 1) % STAGES
    s = step % STAGES
    s_next = (step + 1) % STAGES
    phase = ((step + 1) // STAGES) & 1
    mbarrier.wait(full.index(s_next), phase)
    dp_now = start_scores(dout, matrix(v_tiles, s, BLOCK, D2), zero)
    s_new = start_scores(u, matrix(k_tiles, s_next, BLOCK, D2), zero)
    du_now = start_adding(g, matrix(k_tiles, s_old, BLOCK, D2), du)
    r = column_sizes(size_tiles, s, gl.SliceLayout(0, zero.type.layout), K_NORM)
    p = weights_of(s_now, r, lse, K_NORM)
    block_boundary()  # and p as a dep of the wait: the compiler moves the softmax over neither
    dp_now, p = warpgroup_mma_wait(2 * PARTS, deps=[dp_now, p])
    g_new = operand(score_gradient(p, dp_now, delta, r, K_NORM), g.dtype, left)
    block_boundary()
    s_new, du, g_new = finish(s_new, du_now, g_new)
    mbarrier.arrive(empty.index(s_old), count=1)
    return scaled(s_new, score_scale, FOLD), g_new, du


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
                load_block(u_in, u_tiles, g, own_full.index(g), q_start, q_length, row, h)
                load_block(dout_in, dout_tiles, g, own_full.index(g), q_start, q_length, row, h)
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
                load_block(k_in, k_tiles, s, full.index(s), k_start, k_length, block * BLOCK, h)
                if K_NORM != NONE:
                    at = ((first_sizes + block // GROUPS * H) * GROUPS + block % GROUPS) * BLOCK
                    load_tile(sizes_in, [at], full.index(s), size_tiles.index(s))
                load_block(v_in, v_tiles, s, full.index(s), k_start, k_length, block * BLOCK, h)
                step += 1
            if NEEDS_Q:
                for g in gl.static_range(GROUPS):
                    row = tile * TILE_ROWS + g * BLOCK
                    mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(g), BYTES // 2)
                    load_block(q_in, q_tiles, g, q_full.index(g), q_start, q_length, row, h)
            turn += 1


@gluon.jit
def queries_owner(
    GROUP: gl.constexpr, dq_out, partials_ptr, splits, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item,
    work, tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, scratch, own_full,
    own_empty, q_full, q_empty, full, empty, score_scale, softmax_scale, q_eps, q_weight_stride: gl.constexpr,
    q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr,
    Q_NORM: gl.constexpr, K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr,
    FOLD: gl.constexpr, WEIGHT_GRADS: gl.constexpr, NEEDS_Q: gl.constexpr, STAGES: gl.constexpr, HOLD: gl.constexpr,
    UNROLL: gl.constexpr,
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
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                s_now = start_scores(u, matrix(k_tiles, s, BLOCK, D2), zero)
                dp_now = start_scores(dout, matrix(v_tiles, s, BLOCK, D2), zero)
                mbarrier.wait(full.index(s_next), ((step + 1) // STAGES) & 1)
                s_new = start_scores(u, matrix(k_tiles, s_next, BLOCK, D2), zero)
                s_now = scaled(warpgroup_mma_wait(2 * PARTS, deps=[s_now]), score_scale, FOLD)
                cols = gl.arange(0, BLOCK, of_col)
                s_now = gl.where(((blocks - 1) * BLOCK + cols < k_length)[None, :], s_now, -float("inf"))
                r = column_sizes(size_tiles, s, of_col, K_NORM)
                p = weights_of(s_now, r, lse, K_NORM)
                block_boundary()
                dp_now, p = warpgroup_mma_wait(PARTS, deps=[dp_now, p])
                g = operand(score_gradient(p, dp_now, delta, r, K_NORM), DTYPE, left)
                s_now = scaled(warpgroup_mma_wait(0, deps=[s_new]), score_scale, FOLD)
                s_now = gl.where((cols < k_length)[None, :], s_now, -float("inf"))
                step += 1
                for _ in range((blocks - 2) // UNROLL):
                    for _i in gl.static_range(UNROLL):
                        s_now, g, du = queries_step(
                            s_now, g, du, u, dout, lse, delta, zero, k_tiles, v_tiles, size_tiles, full, empty,
                            score_scale, step, K_NORM, FOLD, D2, STAGES, left,
                        )  # fmt: skip
                        step += 1
                for _ in range((blocks - 2) % UNROLL):
                    s_now, g, du = queries_step(
                        s_now, g, du, u, dout, lse, delta, zero, k_tiles, v_tiles, size_tiles, full, empty,
                        score_scale, step, K_NORM, FOLD, D2, STAGES, left,
                    )  # fmt: skip
                    step += 1
                # the last block
                s = (step - 1) % STAGES
                s_next = step % STAGES
                dp_now = start_scores(dout, matrix(v_tiles, s_next, BLOCK, D2), zero)
                du_now = start_adding(g, matrix(k_tiles, s, BLOCK, D2), du)
                r = column_sizes(size_tiles, s_next, of_col, K_NORM)
                p = weights_of(s_now, r, lse, K_NORM)
                block_boundary()
                dp_now, p = warpgroup_mma_wait(PARTS, deps=[dp_now, p])
                g_new = operand(score_gradient(p, dp_now, delta, r, K_NORM), DTYPE, left)
                block_boundary()
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
                store_block(dq_out, q_tiles, GROUP, q_start, q_length, row, h)
                if WEIGHT_GRADS:
                    partial = ((first_item + item) * splits + GROUP).to(gl.int64)
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


@gluon.jit(do_not_specialize=["first_item", "items", "tokens", "tokens_k", "splits"])
def hopper_queries(
    k_1, v_1, q_1, dout_1, dq_1, k_2, v_2, q_2, dout_2, dq_2, rows_in, sizes_in, partials_ptr, q_weight_ptr,
    q_bias_ptr, k_weight_ptr, items_ptr, offsets_ptr, first_item, items, tokens, tokens_k,
    splits, q_weight_stride: gl.constexpr, q_bias_stride: gl.constexpr, k_weight_stride: gl.constexpr, score_scale,
    softmax_scale, q_eps, H: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, Q_NORM: gl.constexpr,
    K_NORM: gl.constexpr, Q_WEIGHT: gl.constexpr, Q_BIAS: gl.constexpr, K_WEIGHT: gl.constexpr, FOLD: gl.constexpr,
    WEIGHT_GRADS: gl.constexpr, CLASS: gl.constexpr,
    STAGES: gl.constexpr, HOLD: gl.constexpr, UNROLL: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    NEEDS_Q: gl.constexpr = Q_NORM != NONE or WEIGHT_GRADS
    first_item, items = items_of_class(offsets_ptr, first_item, items, CLASS)
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
                0, dq, partials_ptr, splits, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item, work,
                tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, scratch,
                own_full, own_empty, q_full, q_empty, full, empty, score_scale, softmax_scale, q_eps, q_weight_stride,
                q_bias_stride, k_weight_stride, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD,
                WEIGHT_GRADS, NEEDS_Q, STAGES, HOLD, UNROLL,
            )),
            (queries_owner, (
                1, dq, partials_ptr, splits, q_weight_ptr, q_bias_ptr, k_weight_ptr, items_ptr, first_item, work,
                tokens, tokens_k, k_tiles, v_tiles, size_tiles, u_tiles, dout_tiles, row_tiles, q_tiles, scratch,
                own_full, own_empty, q_full, q_empty, full, empty, score_scale, softmax_scale, q_eps, q_weight_stride,
                q_bias_stride, k_weight_stride, H, D, D2, Q_NORM, K_NORM, Q_WEIGHT, Q_BIAS, K_WEIGHT, FOLD,
                WEIGHT_GRADS, NEEDS_Q, STAGES, HOLD, UNROLL,
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
