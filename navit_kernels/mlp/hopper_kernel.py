"""The MLP's products that have its activation behind them, on Hopper, in Gluon. The maths stands in kernel.py.

A program per multiprocessor takes tile after tile of the product: 128 rows, 256 columns. Two warpgroups multiply, each
half of the rows, and leave the tile, rounded, in shared memory; a third reads it from there, applies the activation and
stores, while the two are at the next tile. So the matrix unit waits for neither the activation nor the stores:

    warpgroup 1    loads steps for all   multiply tile i+1, rows 0-63     leave it   multiply tile i+2 …
    warpgroup 2                          multiply tile i+1, rows 64-127   leave it   multiply tile i+2 …
    warpgroup 0    activate tile i, 0-63 … 64-127          activate tile i+1 …

Twelve warps, not thirteen: with a warp more, for the loads, a thread gets 128 registers, and 64 × 256 products of a
warpgroup take 154. The loads of STAGES steps of BLOCK_E go by TMA, issued by warpgroup 1 behind its products.

Barriers. A step's: full, its blocks are there; empty, both warpgroups have left them. A half tile's: filled, it lies in
the hand-off; emptied, it has been read from there.

What lies past the last token is loaded as zeros and not stored, so no token meets another. "swiglu" takes its tile's
columns from two places: 128 gates and the 128 values that belong to them.

T tokens, E model width, M MLP width, U hidden width: M, or 2M for "swiglu".
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

from .._descriptors import describe, fields
from .._jit import BoundKernel, multiprocessors

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until Triton 3.6

BLOCK_T = gl.constexpr(128)
BLOCK_U = gl.constexpr(256)  # of the product's columns
BLOCK_E = gl.constexpr(64)
STAGES = gl.constexpr(3)  # with the hand-off, 208 of 227 KB
GROUPS = gl.constexpr(2)  # warpgroups that multiply
GROUP_ROWS = gl.constexpr(64)
REGISTERS = gl.constexpr(168)  # a thread's, of all three warpgroups


# The activation


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
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gelu(h, ACTIVATION: gl.constexpr):
    """(f(h), f'(h))"""
    square = h * h
    if ACTIVATION == "gelu_tanh":  # kernel.py's σ and slope, with log2(e) in the factors of the exponent
        share = _reciprocal(1.0 + _exp2(h * (-2.302208198144325 - 0.10294324285440393 * square)))
        act = h * share
        slope = share + (act - act * share) * (1.5957691216057308 + 0.21406444881478308 * square)
    else:  # Φ by Abramowitz and Stegun's 7.1.26, to 1e-7: Φ(−|h|) = polynomial(t) · exp(−h²/2), t = 1 / (1 + p|h|/√2)
        t = _reciprocal(1.0 + 0.23164188823507853 * gl.abs(h))
        bell = _exp2(-0.7213475204444817 * square)
        tail = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = tail * t * bell
        share = gl.where(h < 0, tail, 1.0 - tail)
        act = h * share
        slope = share + 0.3989422804014327 * (h * bell)
    return act, slope


@gluon.jit
def _activate(hidden, ACTIVATION: gl.constexpr):
    if ACTIVATION == "swiglu":
        gate = _widen(hidden[0])
        return gate * _reciprocal(1.0 + _exp2(-1.4426950408889634 * gate)) * _widen(hidden[1])
    else:
        act, _ = _gelu(_widen(hidden[0]), ACTIVATION)
        return act


@gluon.jit
def _activate_backward(hidden, dact, ACTIVATION: gl.constexpr):
    """act and the parts of dhidden."""
    dact = _widen(dact)
    if ACTIVATION == "swiglu":
        gate = _widen(hidden[0])
        value = _widen(hidden[1])
        share = _reciprocal(1.0 + _exp2(-1.4426950408889634 * gate))
        silu = gate * share
        return silu * value, (dact * value * (share + (silu - silu * share)), dact * silu)
    else:
        act, slope = _gelu(_widen(hidden[0]), ACTIVATION)
        return act, (dact * slope,)


# The product


@gluon.jit
def _load_step(
    i, steps, a_desc, b_desc, stages, E: gl.constexpr, M: gl.constexpr, WIDTH: gl.constexpr, B_ROWS: gl.constexpr
):
    """Both blocks of this program's step i, as soon as both warpgroups have left those of step i − STAGES."""
    STEPS: gl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    COLUMNS: gl.constexpr = (M + WIDTH - 1) // WIDTH
    a_tiles, b_tiles, full, empty = stages
    if i < steps:
        tile = gl.program_id(0) + i // STEPS * gl.num_programs(0)
        first_t, first_m = tile // COLUMNS * BLOCK_T, tile % COLUMNS * WIDTH
        first_e = i % STEPS * BLOCK_E
        s = i % STAGES
        mbarrier.wait(empty.index(s), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(s), (BLOCK_T + BLOCK_U) * BLOCK_E * 2)
        load_tile(a_desc, [first_t, first_e], full.index(s), a_tiles.index(s))
        if not B_ROWS:
            load_tile(b_desc, [first_e, first_m], full.index(s), b_tiles.index(s))
        elif WIDTH == BLOCK_U:
            load_tile(b_desc, [first_m, first_e], full.index(s), b_tiles.index(s))
        else:
            load_tile(b_desc, [first_m, first_e], full.index(s), b_tiles.index(s).slice(0, WIDTH))
            load_tile(b_desc, [M + first_m, first_e], full.index(s), b_tiles.index(s).slice(WIDTH, WIDTH))


@gluon.jit
def _multiply(
    GROUP: gl.constexpr, a_desc, b_desc, biases, stages, handoff, tiles, E: gl.constexpr, M: gl.constexpr,
    WIDTH: gl.constexpr, B_ROWS: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of each tile; B's blocks are [BLOCK_U, BLOCK_E] (B_ROWS) or [BLOCK_E, BLOCK_U]."""
    STEPS: gl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_U, 16])
    a_tiles, b_tiles, full, empty = stages
    product, filled, emptied = handoff
    steps = gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0)) * STEPS
    if GROUP == 0:
        for i in gl.static_range(STAGES - 1):
            _load_step(i, steps, a_desc, b_desc, stages, E, M, WIDTH, B_ROWS)
    i = 0
    turn = 0
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([GROUP_ROWS, BLOCK_U], gl.float32, layout)
        for _ in range(STEPS):
            s = i % STAGES
            mbarrier.wait(full.index(s), i // STAGES & 1)
            b = b_tiles.index(s)
            if B_ROWS:
                b = b.permute([1, 0])
            acc = warpgroup_mma(a_tiles.index(s).slice(GROUP * GROUP_ROWS, GROUP_ROWS), b, acc, is_async=True)
            if GROUP == 0:
                _load_step(i + (STAGES - 1), steps, a_desc, b_desc, stages, E, M, WIDTH, B_ROWS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(s), count=1)
            i += 1
        mbarrier.wait(emptied.index(GROUP), (turn & 1) ^ 1)
        if biases is not None:
            acc += biases.index(turn & 1).load(gl.SliceLayout(0, layout))[None, :]
        product.slice(GROUP * GROUP_ROWS, GROUP_ROWS).store(acc.to(product.dtype))
        mbarrier.arrive(filled.index(GROUP), count=1)
        turn += 1


@gluon.jit
def _allocate(a_desc, b_desc, B_ROWS: gl.constexpr):
    """The stages and the hand-off: shared memory and its barriers."""
    DTYPE: gl.constexpr = a_desc.dtype
    B_SHAPE: gl.constexpr = [STAGES, BLOCK_U, BLOCK_E] if B_ROWS else [STAGES, BLOCK_E, BLOCK_U]
    a_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_T, BLOCK_E], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(DTYPE, B_SHAPE, b_desc.layout)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_U], DTYPE)
    product = gl.allocate_shared_memory(DTYPE, [BLOCK_T, BLOCK_U], LAYOUT)
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
    return (a_tiles, b_tiles, full, empty), (product, filled, emptied)


@gluon.jit
def _take(handoff, turn, ROW: gl.constexpr, CHUNK: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """CHUNK rows of the hand-off, in the tile's column parts."""
    product, filled, emptied = handoff
    if ROW % GROUP_ROWS == 0:
        mbarrier.wait(filled.index(ROW // GROUP_ROWS), turn & 1)
    rows = product.slice(ROW, CHUNK)
    if WIDTH == BLOCK_U:
        parts = (rows.load(layout),)
    else:
        parts = (rows.slice(0, WIDTH, 1).load(layout), rows.slice(WIDTH, WIDTH, 1).load(layout))
    if (ROW + CHUNK) % GROUP_ROWS == 0:
        mbarrier.arrive(emptied.index(ROW // GROUP_ROWS), count=1)
    return parts


# x · upᵀ


@gluon.jit
def _load_bias(up_bias_ptr, biases, turn, tile, M: gl.constexpr, WIDTH: gl.constexpr):
    """A tile's part of the bias into shared memory, which has room for two: one is written while the other is read."""
    COLUMNS: gl.constexpr = (M + WIDTH - 1) // WIDTH
    offs_u = gl.arange(0, BLOCK_U, gl.BlockedLayout([2], [32], [4], [0]))
    offs_m = tile % COLUMNS * WIDTH + offs_u % WIDTH
    bias = gl.load(up_bias_ptr + offs_u // WIDTH * M + offs_m, mask=offs_m < M, other=0.0)
    biases.index(turn & 1).store(bias.to(gl.float32))


@gluon.jit
def _write_activations(
    up_bias_ptr, hidden_ptr, act_ptr, biases, handoff, tokens, tiles, M: gl.constexpr, WIDTH: gl.constexpr,
    CHUNK: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = BLOCK_U // WIDTH
    COLUMNS: gl.constexpr = (M + WIDTH - 1) // WIDTH
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [PARTS, 4 // PARTS], [1, 0])
    offs_t = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    offs = offs_t[:, None] * M + offs_m[None, :]
    offs_hidden = offs_t[:, None] * (PARTS * M) + offs_m[None, :]
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_t, first_m = tile // COLUMNS * BLOCK_T, tile % COLUMNS * WIDTH
        if biases is not None:
            _load_bias(up_bias_ptr, biases, turn + 1, tile + gl.num_programs(0), M, WIDTH)
        for row in gl.static_range(0, BLOCK_T, CHUNK):
            hidden = _take(handoff, turn, row, CHUNK, WIDTH, layout)
            mask = (offs_t < tokens - first_t - row)[:, None] & (offs_m < M - first_m)[None, :]
            start = (first_t + row).to(gl.int64) * M
            if hidden_ptr is not None:
                for p in gl.static_range(PARTS):
                    gl.store(hidden_ptr + start * PARTS + (p * M + first_m) + offs_hidden, hidden[p], mask=mask)
            act = _activate(hidden, ACTIVATION)
            gl.store(act_ptr + start + first_m + offs, act.to(hidden[0].dtype), mask=mask)
        turn += 1


@gluon.jit(do_not_specialize=["tokens"])
def up_kernel(
    x_desc, up_desc, up_bias_ptr, hidden_ptr, act_ptr, tokens, E: gl.constexpr, M: gl.constexpr, CHUNK: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """hidden (where there is a hidden_ptr) and act."""
    WIDTH: gl.constexpr = BLOCK_U // 2 if ACTIVATION == "swiglu" else BLOCK_U
    tiles = gl.cdiv(tokens, BLOCK_T) * ((M + WIDTH - 1) // WIDTH)
    stages, handoff = _allocate(x_desc, up_desc, True)
    if up_bias_ptr is None:
        biases: gl.constexpr = None
    else:
        biases = gl.allocate_shared_memory(gl.float32, [2, BLOCK_U], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        _load_bias(up_bias_ptr, biases, 0, gl.program_id(0), M, WIDTH)
    gl.warp_specialize([
        (_write_activations,
         (up_bias_ptr, hidden_ptr, act_ptr, biases, handoff, tokens, tiles, M, WIDTH, CHUNK, ACTIVATION)),
        (_multiply, (0, x_desc, up_desc, biases, stages, handoff, tiles, E, M, WIDTH, True)),
        (_multiply, (1, x_desc, up_desc, biases, stages, handoff, tiles, E, M, WIDTH, True)),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


# dout · down


@gluon.jit
def _load_hidden(hidden_ptr, tile, row, offs_t, offs_m, tokens, M: gl.constexpr, PARTS: gl.constexpr):
    """CHUNK rows of a tile's hidden, in parts; past the last tile nothing is loaded."""
    COLUMNS: gl.constexpr = (M + BLOCK_U - 1) // BLOCK_U
    first_t, first_m = tile // COLUMNS * BLOCK_T + row, tile % COLUMNS * BLOCK_U
    mask = (offs_t < tokens - first_t)[:, None] & (offs_m < M - first_m)[None, :]
    offs = offs_t[:, None] * (PARTS * M) + offs_m[None, :]
    start = hidden_ptr + first_t.to(gl.int64) * (PARTS * M) + first_m
    parts = (gl.load(start + offs, mask=mask, other=0.0),)
    if PARTS == 2:
        return parts + (gl.load(start + M + offs, mask=mask, other=0.0),)  # noqa: RUF005
    else:
        return parts


@gluon.jit
def _add_rows(sums, values, layout: gl.constexpr):
    """Of each part, a thread's own rows onto its one row of sums [4, BLOCK_U]."""
    more = ()
    for p in gl.static_range(len(sums)):
        rows = values[p].reshape([values[p].shape[0] // 4, 4, BLOCK_U])
        more = more + (sums[p] + gl.convert_layout(gl.sum(rows, 0), layout, assert_trivial=True),)  # noqa: RUF005
    return more


@gluon.jit
def _write_gradients(
    hidden_ptr, act_ptr, dhidden_ptr, dup_bias_ptr, handoff, tokens, tiles, M: gl.constexpr, CHUNK: gl.constexpr,
    AHEAD: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    COLUMNS: gl.constexpr = (M + BLOCK_U - 1) // BLOCK_U
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 4], [1, 0])  # a warp sums its columns alone
    offs_t = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, BLOCK_U, gl.SliceLayout(0, layout))
    offs = offs_t[:, None] * M + offs_m[None, :]
    offs_hidden = offs_t[:, None] * (PARTS * M) + offs_m[None, :]
    first = gl.program_id(0)
    ahead = ()
    for i in gl.static_range(AHEAD):
        ahead = ahead + _load_hidden(hidden_ptr, first, i * CHUNK, offs_t, offs_m, tokens, M, PARTS)
    turn = 0
    for tile in range(first, tiles, gl.num_programs(0)):
        first_t, first_m = tile // COLUMNS * BLOCK_T, tile % COLUMNS * BLOCK_U
        for row in gl.static_range(0, BLOCK_T, CHUNK):
            if row + AHEAD * CHUNK < BLOCK_T:
                more = _load_hidden(hidden_ptr, tile, row + AHEAD * CHUNK, offs_t, offs_m, tokens, M, PARTS)
            else:
                more = _load_hidden(
                    hidden_ptr, tile + gl.num_programs(0), row + AHEAD * CHUNK - BLOCK_T, offs_t, offs_m, tokens, M,
                    PARTS,
                )  # fmt: skip
            hidden = ahead[:PARTS]
            ahead = ahead[PARTS:] + more
            dact = _take(handoff, turn, row, CHUNK, BLOCK_U, layout)[0]
            mask = (offs_t < tokens - first_t - row)[:, None] & (offs_m < M - first_m)[None, :]
            start = (first_t + row).to(gl.int64) * M
            act, dhidden = _activate_backward(hidden, dact, ACTIVATION)
            gl.store(act_ptr + start + first_m + offs, act.to(dact.dtype), mask=mask)
            for p in gl.static_range(PARTS):
                at = dhidden_ptr + start * PARTS + (p * M + first_m) + offs_hidden
                gl.store(at, dhidden[p].to(dact.dtype), mask=mask)
            if dup_bias_ptr is not None:  # of a thread's own rows for now
                if row == 0:
                    sums = (gl.zeros([4, BLOCK_U], gl.float32, layout),) * PARTS
                sums = _add_rows(sums, dhidden, layout)
        if dup_bias_ptr is not None:
            start = (tile // COLUMNS).to(gl.int64) * (PARTS * M) + first_m
            for p in gl.static_range(PARTS):
                gl.store(dup_bias_ptr + start + p * M + offs_m, gl.sum(sums[p], 0), mask=offs_m < M - first_m)
        turn += 1


@gluon.jit(do_not_specialize=["tokens"])
def down_backward_kernel(
    dout_desc, down_desc, hidden_ptr, act_ptr, dhidden_ptr, dup_bias_ptr, tokens, E: gl.constexpr, M: gl.constexpr,
    CHUNK: gl.constexpr, AHEAD: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """act and dhidden, and dhidden's sums over each row of tiles."""
    tiles = gl.cdiv(tokens, BLOCK_T) * ((M + BLOCK_U - 1) // BLOCK_U)
    stages, handoff = _allocate(dout_desc, down_desc, False)
    gl.warp_specialize([
        (_write_gradients,
         (hidden_ptr, act_ptr, dhidden_ptr, dup_bias_ptr, handoff, tokens, tiles, M, CHUNK, AHEAD, ACTIVATION)),
        (_multiply, (0, dout_desc, down_desc, None, stages, handoff, tiles, E, M, BLOCK_U, False)),
        (_multiply, (1, dout_desc, down_desc, None, stages, handoff, tiles, E, M, BLOCK_U, False)),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


# Launchers


def _blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What a kernel loads blocks of a matrix through."""
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return describe(tensor, _block_fields(tensor.dtype, tensor.shape, rows, columns))


@functools.lru_cache(1024)
def _block_fields(dtype: torch.dtype, shape: tuple[int, int], rows: int, columns: int) -> dict[str, Any]:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], element)
    return fields(dtype, shape, (shape[1], 1), (rows, columns), layout)


@functools.lru_cache(1024)
def _bound(kernel: Any, width: int, mlp_width: int, activation: str, chunk: int, **options: int) -> BoundKernel:
    return BoundKernel(kernel, E=width, M=mlp_width, CHUNK=chunk, ACTIVATION=activation, num_warps=4, **options)


def tile_rows(tokens: int) -> int:
    """Rows of tiles, each of which writes its sums of dhidden."""
    return -(-tokens // BLOCK_T.value)


def up(
    x_TE: Tensor, up_UE: Tensor, up_bias_U: Tensor | None, hidden_TU: Tensor | None, act_TM: Tensor, activation: str,
    chunk: int,
) -> None:  # fmt: skip
    """Write hidden, where it is wanted, and act; the activation's warpgroup takes `chunk` rows at a time."""
    (tokens, width), mlp_width = x_TE.shape, act_TM.shape[1]
    columns = BLOCK_U.value // (2 if activation == "swiglu" else 1)
    tiles = tile_rows(tokens) * -(-mlp_width // columns)
    _bound(up_kernel, width, mlp_width, activation, chunk)(
        (min(tiles, multiprocessors(x_TE.device)),),
        x_desc=_blocks(x_TE, BLOCK_T.value, BLOCK_E.value), up_desc=_blocks(up_UE, columns, BLOCK_E.value),
        up_bias_ptr=up_bias_U, hidden_ptr=hidden_TU, act_ptr=act_TM, tokens=tokens,
    )  # fmt: skip


def down_backward(
    dout_TE: Tensor, down_EM: Tensor, hidden_TU: Tensor, act_TM: Tensor, dhidden_TU: Tensor, partial_GU: Tensor | None,
    activation: str, chunk: int, ahead: int,
) -> None:  # fmt: skip
    """Write act, dhidden and, where they are wanted, dhidden's sums over each row of tiles; hidden is loaded `ahead`
    chunks before its use."""
    (tokens, width), mlp_width = dout_TE.shape, act_TM.shape[1]
    tiles = tile_rows(tokens) * -(-mlp_width // BLOCK_U.value)
    _bound(down_backward_kernel, width, mlp_width, activation, chunk, AHEAD=ahead)(
        (min(tiles, multiprocessors(dout_TE.device)),),
        dout_desc=_blocks(dout_TE, BLOCK_T.value, BLOCK_E.value),
        down_desc=_blocks(down_EM, BLOCK_E.value, BLOCK_U.value), hidden_ptr=hidden_TU, act_ptr=act_TM,
        dhidden_ptr=dhidden_TU, dup_bias_ptr=partial_GU, tokens=tokens,
    )  # fmt: skip
