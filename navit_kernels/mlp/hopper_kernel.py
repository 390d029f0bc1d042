"""The MLP's two products with the activation behind them on Hopper, in Gluon. The maths stands in kernel.py."""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until Triton 3.6

import os
DEPTH = gl.constexpr(int(os.environ.get("DEPTH", "0")))
EPI = gl.constexpr(os.environ.get("EPI", ""))
CM = gl.constexpr(os.environ.get("CM", ""))
GROUPS = gl.constexpr(2)  # warpgroups that multiply: each has half of a tile's rows


@gluon.jit
def _widen(x):
    """float32 of a 16-bit x; two instructions for two bfloat16, where the compiler takes three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(gl.float32)


@gluon.jit
def _sigmoid2(x):
    """1 / (1 + 2^-x) of -x."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _gelu(h, ACTIVATION: gl.constexpr):
    """(f(h), f'(h))"""
    square = h * h
    if ACTIVATION == "gelu_tanh":
        share = _sigmoid2(h * (-2.302208198144325 - 0.10294324285440393 * square))
        act = h * share
        slope = (act - act * share) * (1.5957691216057308 + 0.21406444881478308 * square) + share
    else:
        t = _reciprocal(1.0 + 0.23164189298455136 * gl.abs(h))
        density = _exp2(-0.7213475204444817 * square)
        poly = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715))))
        tail = poly * density
        share = gl.where(h < 0, tail, 1.0 - tail)
        act = h * share
        slope = share + 0.3989422804014327 * (h * density)
    return act, slope


@gluon.jit
def _load_step(
    i, steps, a_desc, b_desc, a_tiles, b_tiles, full, empty, COLUMNS: gl.constexpr, STEPS: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_E: gl.constexpr, STAGES: gl.constexpr, FORWARD: gl.constexpr,
):  # fmt: skip
    """The blocks of this program's step i, as soon as both warpgroups have left those of step i - STAGES."""
    if i < steps:
        tile = gl.program_id(0) + i // STEPS * gl.num_programs(0)
        first_t = tile // COLUMNS * BLOCK_T
        first_m = tile % COLUMNS * BLOCK_M
        first_e = i % STEPS * BLOCK_E
        s = i % STAGES
        mbarrier.wait(empty.index(s), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(s), (BLOCK_T + BLOCK_M) * BLOCK_E * 2)
        load_tile(a_desc, [first_t, first_e], full.index(s), a_tiles.index(s))
        if FORWARD:
            load_tile(b_desc, [first_m, first_e], full.index(s), b_tiles.index(s))
        else:
            load_tile(b_desc, [first_e, first_m], full.index(s), b_tiles.index(s))


@gluon.jit
def _multiply(
    GROUP: gl.constexpr, a_desc, b_desc, bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles,
    M: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_E: gl.constexpr, STAGES: gl.constexpr, FORWARD: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_T // GROUPS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    steps = gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0)) * STEPS
    if GROUP == 0:
        for i in gl.static_range(STAGES - 1):
            _load_step(
                i, steps, a_desc, b_desc, a_tiles, b_tiles, full, empty, COLUMNS, STEPS, BLOCK_T, BLOCK_M, BLOCK_E,
                STAGES, FORWARD,
            )  # fmt: skip
    i = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, layout)
        for step in range(STEPS):
            s = i % STAGES
            mbarrier.wait(full.index(s), i // STAGES & 1)
            a = a_tiles.index(s).slice(GROUP * ROWS, ROWS)
            b = b_tiles.index(s)
            if FORWARD:
                b = b.permute([1, 0])
            acc = warpgroup_mma(a, b, acc, is_async=True)
            if DEPTH == 1:
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((i + (STAGES - 1)) % STAGES), count=1, pred=step > 0)
            if GROUP == 0:
                _load_step(
                    i + (STAGES - 1), steps, a_desc, b_desc, a_tiles, b_tiles, full, empty, COLUMNS, STEPS, BLOCK_T,
                    BLOCK_M, BLOCK_E, STAGES, FORWARD,
                )  # fmt: skip
            if DEPTH == 0:
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(s), count=1)
            i += 1
        if DEPTH == 1:
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((i + (STAGES - 1)) % STAGES), count=1)
        if bias_ptr is not None:
            offs_m = tile % COLUMNS * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
            acc += gl.load(bias_ptr + offs_m, mask=offs_m < M, other=0.0).to(gl.float32)[None, :]
        mbarrier.wait(emptied.index(GROUP), (turn & 1) ^ 1)
        handoff.slice(GROUP * ROWS, ROWS).store(acc.to(handoff.dtype))
        mbarrier.arrive(filled.index(GROUP), count=1)
        turn += 1


@gluon.jit
def _multiply_first(
    a_desc, b_desc, bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles,
    M: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_E: gl.constexpr, STAGES: gl.constexpr, FORWARD: gl.constexpr,
):  # fmt: skip
    _multiply(
        0, a_desc, b_desc, bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles, M, COLUMNS, STEPS,
        BLOCK_T, BLOCK_M, BLOCK_E, STAGES, FORWARD,
    )  # fmt: skip


@gluon.jit
def _multiply_second(
    a_desc, b_desc, bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles,
    M: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_E: gl.constexpr, STAGES: gl.constexpr, FORWARD: gl.constexpr,
):  # fmt: skip
    _multiply(
        1, a_desc, b_desc, bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles, M, COLUMNS, STEPS,
        BLOCK_T, BLOCK_M, BLOCK_E, STAGES, FORWARD,
    )  # fmt: skip


@gluon.jit
def _activate(
    hidden_ptr, act_ptr, handoff, filled, emptied, tokens, tiles, M: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr, CHUNK: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_T // GROUPS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 4], [1, 0])
    offs_t = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    offs = offs_t[:, None] * M + offs_m[None, :]
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_t = tile // COLUMNS * BLOCK_T
        first_m = tile % COLUMNS * BLOCK_M
        for row in gl.static_range(0, BLOCK_T, CHUNK):
            if row % ROWS == 0:
                mbarrier.wait(filled.index(row // ROWS), turn & 1)
            hidden = handoff.slice(row, CHUNK).load(layout)
            if (row + CHUNK) % ROWS == 0:
                mbarrier.arrive(emptied.index(row // ROWS), count=1)
            start = (first_t + row).to(gl.int64) * M + first_m
            mask = (offs_t < tokens - first_t - row)[:, None] & (offs_m < M - first_m)[None, :]
            if EPI != "none":
                if hidden_ptr is not None:
                    gl.store(hidden_ptr + start + offs, hidden, mask=mask, cache_modifier=CM)
                if EPI != "copy":
                    act, _ = _gelu(_widen(hidden), ACTIVATION)
                    gl.store(act_ptr + start + offs, act.to(handoff.dtype), mask=mask, cache_modifier=CM)
            else:
                gl.store(hidden_ptr + start + offs, hidden, mask=mask & (hidden == 123.25), cache_modifier=CM)
        turn += 1


@gluon.jit
def _load_hidden(hidden_ptr, tile, row, offs, offs_t, offs_m, tokens, M: gl.constexpr, COLUMNS: gl.constexpr,
                 BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr):
    first_t = tile // COLUMNS * BLOCK_T + row
    first_m = tile % COLUMNS * BLOCK_M
    mask = (offs_t < tokens - first_t)[:, None] & (offs_m < M - first_m)[None, :]
    return gl.load(hidden_ptr + first_t.to(gl.int64) * M + first_m + offs, mask=mask, other=0.0)


@gluon.jit
def _activate_backward(
    hidden_ptr, act_ptr, dhidden_ptr, dup_bias_ptr, handoff, filled, emptied, tokens, tiles, M: gl.constexpr,
    COLUMNS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr, CHUNK: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_T // GROUPS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 4], [1, 0])
    offs_t = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    offs = offs_t[:, None] * M + offs_m[None, :]
    turn = 0
    first = gl.program_id(0)
    ahead = _load_hidden(hidden_ptr, first, 0, offs, offs_t, offs_m, tokens, M, COLUMNS, BLOCK_T, BLOCK_M)
    for tile in range(first, tiles, gl.num_programs(0)):
        first_t = tile // COLUMNS * BLOCK_T
        first_m = tile % COLUMNS * BLOCK_M
        sums = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(0, layout))
        for row in gl.static_range(0, BLOCK_T, CHUNK):
            hidden = ahead
            if row + CHUNK < BLOCK_T:
                ahead = _load_hidden(
                    hidden_ptr, tile, row + CHUNK, offs, offs_t, offs_m, tokens, M, COLUMNS, BLOCK_T, BLOCK_M
                )
            else:  # past the last tile all rows are masked
                ahead = _load_hidden(
                    hidden_ptr, tile + gl.num_programs(0), 0, offs, offs_t, offs_m, tokens, M, COLUMNS, BLOCK_T, BLOCK_M
                )
            if row % ROWS == 0:
                mbarrier.wait(filled.index(row // ROWS), turn & 1)
            dact = handoff.slice(row, CHUNK).load(layout)
            if (row + CHUNK) % ROWS == 0:
                mbarrier.arrive(emptied.index(row // ROWS), count=1)
            start = (first_t + row).to(gl.int64) * M + first_m
            mask = (offs_t < tokens - first_t - row)[:, None] & (offs_m < M - first_m)[None, :]
            act, slope = _gelu(_widen(hidden), ACTIVATION)
            gl.store(act_ptr + start + offs, act.to(handoff.dtype), mask=mask, cache_modifier=CM)
            dhidden = _widen(dact) * slope
            gl.store(dhidden_ptr + start + offs, dhidden.to(handoff.dtype), mask=mask, cache_modifier=CM)
            if dup_bias_ptr is not None:
                sums += gl.sum(dhidden, 0)
        if dup_bias_ptr is not None:
            at = dup_bias_ptr + (tile // COLUMNS).to(gl.int64) * M + first_m
            gl.store(at + offs_m, sums, mask=offs_m < M - first_m)
        turn += 1


@gluon.jit
def _allocate(a_desc, b_desc, BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory: the stages' tiles, the hand-off, and barriers full, empty, filled, emptied."""
    DTYPE: gl.constexpr = a_desc.dtype
    a_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, a_desc.block_shape[0], a_desc.block_shape[1]], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, b_desc.block_shape[0], b_desc.block_shape[1]], b_desc.layout)
    handoff = gl.allocate_shared_memory(
        DTYPE, [BLOCK_T, BLOCK_M], gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_M], DTYPE)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=1)
    fence_async_shared()
    return a_tiles, b_tiles, handoff, full, empty, filled, emptied


@gluon.jit(do_not_specialize=["tokens"])
def hopper_up_kernel(
    x_desc, up_desc, up_bias_ptr, hidden_ptr, act_ptr, tokens, E: gl.constexpr, M: gl.constexpr, BLOCK_T: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_E: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr, REGISTERS: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    STEPS: gl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    tiles = gl.cdiv(tokens, BLOCK_T) * COLUMNS
    a_tiles, b_tiles, handoff, full, empty, filled, emptied = _allocate(x_desc, up_desc, BLOCK_T, BLOCK_M, STAGES)
    gl.warp_specialize([
        (_activate, (hidden_ptr, act_ptr, handoff, filled, emptied, tokens, tiles, M, COLUMNS, BLOCK_T, BLOCK_M, CHUNK, ACTIVATION)),
        (_multiply_first, (x_desc, up_desc, up_bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles, M, COLUMNS, STEPS, BLOCK_T, BLOCK_M, BLOCK_E, STAGES, True)),
        (_multiply_second, (x_desc, up_desc, up_bias_ptr, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles, M, COLUMNS, STEPS, BLOCK_T, BLOCK_M, BLOCK_E, STAGES, True)),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


@gluon.jit(do_not_specialize=["tokens"])
def hopper_down_backward_kernel(
    dout_desc, down_desc, hidden_ptr, act_ptr, dhidden_ptr, dup_bias_ptr, tokens, E: gl.constexpr, M: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_E: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    REGISTERS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    STEPS: gl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    tiles = gl.cdiv(tokens, BLOCK_T) * COLUMNS
    a_tiles, b_tiles, handoff, full, empty, filled, emptied = _allocate(dout_desc, down_desc, BLOCK_T, BLOCK_M, STAGES)
    gl.warp_specialize([
        (_activate_backward, (hidden_ptr, act_ptr, dhidden_ptr, dup_bias_ptr, handoff, filled, emptied, tokens, tiles, M, COLUMNS, BLOCK_T, BLOCK_M, CHUNK, ACTIVATION)),
        (_multiply_first, (dout_desc, down_desc, None, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles, M, COLUMNS, STEPS, BLOCK_T, BLOCK_M, BLOCK_E, STAGES, False)),
        (_multiply_second, (dout_desc, down_desc, None, a_tiles, b_tiles, handoff, full, empty, filled, emptied, tiles, M, COLUMNS, STEPS, BLOCK_T, BLOCK_M, BLOCK_E, STAGES, False)),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
