"""Patch embedding + positions in one pass, and a backward that reduces by table row instead of scattering.

    unit = (x − Σ x / E) · rstd                      rstd = rsqrt(Σ (x − Σ x / E)² / E + eps)
    row  = (1 − f) · row_table[i] + f · row_table[i + 1]        at coordinate i + f, f = 0 for integers
    y    = unit · weight + bias + row + column       without a norm x + row + column
                                                     "concat": row and column side by side; "product": row · column

Backward, with d_unit = weight · dy:

    dx = rstd · (d_unit − Σ d_unit / E − unit · Σ (d_unit · unit) / E)
    d_weight = Σ_tokens dy · unit                    d_bias = Σ_tokens dy
    d_row_table = share @ d_row                      share[l, t] = [i_t = l] · (1 − f_t) + [i_t + 1 = l] · f_t
    d_row = dy, its columns for "concat", or dy · column for "product"; the column table alike

A table gradient is a matrix product with `share`, made on the fly from the coordinates: tokens in any order, no
atomics, the same bits every time. Sums over tokens run over each program's own tokens, then over the programs. (A dy
that is not finite makes its whole column of both table gradients so: 0 · NaN is NaN.)

Dehghani et al.: Patch n' Pack: NaViT (2023), section 3.1, arXiv 2307.06304.
T tokens, L table rows, E model width, G programs, N parameter gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._jit import launch_kernel


@triton.jit
def _corners(coords_ptr, axis, offs_t, mask_t, length):
    """The two table rows around each token's coordinate and the fraction of the way between them."""
    place = tl.load(coords_ptr + 2 * offs_t.to(tl.int64) + axis, mask=mask_t, other=0)
    if place.dtype.is_floating():
        place = tl.minimum(tl.maximum(place.to(tl.float32), 0.0), (length - 1).to(tl.float32))
        lower = tl.floor(place)
        below = lower.to(tl.int32)
        return below, tl.minimum(below + 1, length - 1), place - lower
    else:
        below = tl.minimum(tl.maximum(place, 0), length - 1).to(tl.int32)
        return below, below, tl.zeros_like(below).to(tl.float32)


@triton.jit
def _look_up(table_ptr, below, above, fraction, offs_e, mask, WIDTH: tl.constexpr, LERP: tl.constexpr):
    """Rows of a table, [ROWS, BLOCK_E] float32."""
    tile = tl.load(table_ptr + (below.to(tl.int64) * WIDTH)[:, None] + offs_e[None, :], mask=mask, other=0.0)
    tile = tile.to(tl.float32)
    if LERP:
        next_tile = tl.load(table_ptr + (above.to(tl.int64) * WIDTH)[:, None] + offs_e[None, :], mask=mask, other=0.0)
        tile = (1 - fraction)[:, None] * tile + fraction[:, None] * next_tile.to(tl.float32)
    return tile


@triton.jit
def _unit(x, mask_e, eps, E: tl.constexpr):
    """Normalize each token; also rstd."""
    centred = tl.where(mask_e[None, :], x - (tl.sum(x, 1) / E)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / E + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["tokens", "row_length", "column_length"])
def forward_kernel(
    x_ptr, coords_ptr, row_table_ptr, column_table_ptr, weight_ptr, bias_ptr, y_ptr,
    tokens, row_length, column_length, eps,
    E: tl.constexpr, ROW_WIDTH: tl.constexpr, COLUMN_WIDTH: tl.constexpr, PRODUCT: tl.constexpr, LERP: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < tokens
    mask_e = offs_e < E
    mask = mask_t[:, None] & mask_e[None, :]
    offs = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]

    x = tl.load(x_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [ROWS, BLOCK_E]
    below, above, fraction = _corners(coords_ptr, 0, offs_t, mask_t, row_length)
    mask_row = mask_t[:, None] & (offs_e < ROW_WIDTH)[None, :]
    row = _look_up(row_table_ptr, below, above, fraction, offs_e, mask_row, ROW_WIDTH, LERP)
    below, above, fraction = _corners(coords_ptr, 1, offs_t, mask_t, column_length)
    mask_column = mask & (offs_e >= E - COLUMN_WIDTH)[None, :]
    column = _look_up(
        column_table_ptr, below, above, fraction, offs_e - (E - COLUMN_WIDTH), mask_column, COLUMN_WIDTH, LERP
    )

    if weight_ptr is not None:
        x, _ = _unit(x, mask_e, eps, E)
        x *= tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            x += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    if PRODUCT:
        y = x + row * column
    else:
        y = x + (row + column)  # "concat": one of them is zero

    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, d_weight_ptr, d_bias_ptr, tokens, eps,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Program g takes the blocks g, g + G, … of ROWS tokens and writes row g of the partial sums."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_E], tl.float32)
    d_bias = tl.zeros([BLOCK_E], tl.float32)

    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=2):
        offs_t = block * ROWS + tl.arange(0, ROWS)
        mask = (offs_t < tokens)[:, None] & mask_e[None, :]
        offs = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_E]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)

        unit, rstd = _unit(x, mask_e, eps, E)
        d_unit = dy * weight[None, :]
        dx = d_unit - (tl.sum(d_unit, 1) / E)[:, None] - unit * (tl.sum(d_unit * unit, 1) / E)[:, None]
        dx *= rstd[:, None]
        d_weight += tl.sum(dy * unit, 0)
        d_bias += tl.sum(dy, 0)

        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    offs = tl.program_id(0).to(tl.int64) * STRIDE + offs_e
    tl.store(d_weight_ptr + offs, d_weight, mask=mask_e)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + offs, d_bias, mask=mask_e)


@triton.jit(do_not_specialize=["tokens", "row_length", "column_length", "chunk"])
def table_backward_kernel(
    dy_ptr, coords_ptr, row_table_ptr, column_table_ptr, partial_ptr,
    tokens, row_length, column_length, chunk, one,
    E: tl.constexpr, ROW_WIDTH: tl.constexpr, COLUMN_WIDTH: tl.constexpr, PRODUCT: tl.constexpr, LERP: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program sums one chunk of tokens into BLOCK_L rows and BLOCK_E columns of one table's gradient."""
    row_blocks = tl.cdiv(row_length, BLOCK_L)
    block_l = tl.program_id(0)  # the fastest axis, so that programs which read the same dy run together
    partial_ptr += tl.program_id(2).to(tl.int64) * (row_length * ROW_WIDTH + column_length * COLUMN_WIDTH)
    if block_l < row_blocks:
        axis = 0
        length = row_length
        other_length = column_length
        other_ptr = column_table_ptr
        width = ROW_WIDTH
        first_e = 0
    else:
        axis = 1
        length = column_length
        other_length = row_length
        other_ptr = row_table_ptr
        width = COLUMN_WIDTH
        first_e = E - COLUMN_WIDTH
        block_l -= row_blocks
        partial_ptr += row_length * ROW_WIDTH
    offs_l = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < width
    sums = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)

    first_t = tl.program_id(2) * chunk
    for start in tl.range(first_t, tl.minimum(first_t + chunk, tokens), BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < tokens
        mask = mask_t[:, None] & mask_e[None, :]
        offs = offs_t.to(tl.int64)[:, None] * E + (first_e + offs_e)[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_E]
        below, above, fraction = _corners(coords_ptr, axis, offs_t, mask_t, length)
        if PRODUCT:
            other_below, other_above, other_fraction = _corners(coords_ptr, 1 - axis, offs_t, mask_t, other_length)
            other = _look_up(other_ptr, other_below, other_above, other_fraction, offs_e, mask, E, LERP)
            dy = dy.to(tl.float32) * other

        share = tl.where(offs_l[:, None] == below[None, :], 1 - fraction[None, :], 0.0)  # [BLOCK_L, BLOCK_T]
        if LERP:
            share += tl.where(offs_l[:, None] == above[None, :], fraction[None, :], 0.0)
            dy = dy.to(tl.float32)
        # `one` is 1, which the compiler cannot know: it would chain the sum through the matrix unit, which truncates
        sums += tl.dot(share.to(dy.dtype), dy, input_precision="ieee") * one

    offs = offs_l[:, None] * width + offs_e[None, :]
    tl.store(partial_ptr + offs, sums, mask=(offs_l < length)[:, None] & mask_e[None, :])


PROGRAMS = 528  # of the norm's sums over tokens, the same on every GPU: so are the sums
TABLE_PROGRAMS = 264  # of the tables' sums


def choose_config(width: int, backward: bool = False, lerp: bool = False) -> dict[str, int]:
    """Launch choice by model width.

    H100, bfloat16, with a norm, µs at widths 768 and 1152: forward, a row to two warps, 87 and 126 (four warps: 103 and
    154); between table rows, a row to a warp, 88 and 130 (two warps: 111 and 174; two rows to them: 112 and 168);
    backward, four rows at a time, 121 and 224 (half the warps: 120 and 206, which spills with Triton 3.9).
    """
    block = max(triton.next_power_of_2(width), 16)
    if backward:
        rows = max(1, min(4, 8192 // block))
        return {"E": width, "BLOCK_E": block, "ROWS": rows, "num_warps": min(max(block // 256, 2), 16)}
    warps = max(block // 2048, 1) if lerp else max(block // 1024, 2)
    return {"E": width, "BLOCK_E": block, "ROWS": 1, "num_warps": min(warps, 16)}


def choose_table_config(exact: bool, length: int) -> dict[str, int]:
    """Launch choice of the table gradients: on tensor cores where 16-bit operands are exact.

    H100, tables of 64 rows, µs at widths 768 and 1152: 45 and 63; with 3 stages 49 and 69, with 528 programs 54 and 71,
    with BLOCK_E 64 or 256 from 54 and 77. Exact float32 is not tuned.
    """
    block_l = min(max(triton.next_power_of_2(length), 16), 64)
    if exact:
        return {"BLOCK_L": block_l, "BLOCK_E": 128, "BLOCK_T": 64, "STAGES": 4, "num_warps": 4}
    return {"BLOCK_L": block_l, "BLOCK_E": 64, "BLOCK_T": 32, "STAGES": 1, "num_warps": 8}


def add_positions(
    x_TE: Tensor,
    coords_T2: Tensor,
    row_table_LE: Tensor,
    column_table_LE: Tensor,
    combine: str,
    weight_E: Tensor | None,
    bias_E: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return (T, E) in dtype."""
    tokens, width = x_TE.shape
    y_TE = x_TE.new_empty(tokens, width, dtype=dtype)
    if tokens:
        lerp = coords_T2.is_floating_point()
        config = choose_config(width, lerp=lerp)
        launch_kernel(
            forward_kernel, (triton.cdiv(tokens, config["ROWS"]),),
            x_TE.contiguous(), coords_T2.contiguous(), row_table_LE.contiguous(), column_table_LE.contiguous(),
            weight_E, bias_E, y_TE, tokens, row_table_LE.shape[0], column_table_LE.shape[0], eps,
            ROW_WIDTH=row_table_LE.shape[1], COLUMN_WIDTH=column_table_LE.shape[1],
            PRODUCT=combine == "product", LERP=lerp, **config,
        )  # fmt: skip
    return y_TE


def norm_backward(dy_TE: Tensor, x_TE: Tensor, weight_E: Tensor, has_bias: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Return dx and in float32 the rows d_weight and d_bias (if has_bias)."""
    tokens, width = x_TE.shape
    config = choose_config(width, backward=True)
    dx_TE = x_TE.new_empty(tokens, width)
    programs = min(triton.cdiv(tokens, config["ROWS"]), PROGRAMS)
    partial_GNE = x_TE.new_empty(programs, 1 + has_bias, width, dtype=torch.float32)
    if tokens:
        launch_kernel(
            norm_backward_kernel, (programs,),
            dy_TE.contiguous(), x_TE.contiguous(), weight_E, dx_TE,
            partial_GNE[:, 0], partial_GNE[:, 1] if has_bias else None,
            tokens, eps, STRIDE=partial_GNE.stride(0), **config,
        )  # fmt: skip
    return dx_TE, partial_GNE.sum(0)


def table_backward(
    dy_TE: Tensor, coords_T2: Tensor, row_table_LE: Tensor, column_table_LE: Tensor, combine: str
) -> Tensor:
    """Return both tables' gradients in float32, flat, the row table's first."""
    tokens, width = dy_TE.shape
    (rows, row_width), (columns, column_width) = row_table_LE.shape, column_table_LE.shape
    lerp, product = coords_T2.is_floating_point(), combine == "product"
    config = choose_table_config(dy_TE.itemsize == 2 and not lerp and not product, max(rows, columns))
    blocks_l = triton.cdiv(rows, config["BLOCK_L"]) + triton.cdiv(columns, config["BLOCK_L"])
    blocks_e = triton.cdiv(max(row_width, column_width), config["BLOCK_E"])
    chunk = triton.cdiv(tokens, max(1, TABLE_PROGRAMS // (blocks_l * blocks_e)))
    chunk = max(triton.cdiv(chunk, config["BLOCK_T"]), 1) * config["BLOCK_T"]
    chunks = triton.cdiv(tokens, chunk)
    partial = dy_TE.new_empty(chunks, rows * row_width + columns * column_width, dtype=torch.float32)
    if tokens:
        launch_kernel(
            table_backward_kernel, (blocks_l, blocks_e, chunks),
            dy_TE.contiguous(), coords_T2.contiguous(), row_table_LE.contiguous(), column_table_LE.contiguous(),
            partial, tokens, rows, columns, chunk, 1.0,
            E=width, ROW_WIDTH=row_width, COLUMN_WIDTH=column_width, PRODUCT=product, LERP=lerp, **config,
        )  # fmt: skip
    return partial.sum(0)
