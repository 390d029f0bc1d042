"""Sums over tokens, as the gradient of a bias is one.

    sum[n] = Σ_tokens x[t, n]

Each program adds rows of its own, in float32; its row of partial sums is then added to the others', for several such
sums in one launch. No atomics: the same bits every time. T tokens, N columns, G programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float32

from ._jit import launch_kernel, multiprocessors

ROWS, BLOCK_N, PROGRAMS = 16, 256, 8  # of a block; programs a multiprocessor
SUM_ROWS, SUM_BLOCK_N = 64, 32  # of partial sums: many programs, each of which waits for few loads


@triton.jit
def _sum_rows(
    x_ptr, out_ptr, rows, first, step, block, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Of the columns of a block, over the rows' blocks first, first + step, …"""
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for row_block in tl.range(first, tl.cdiv(rows, ROWS), step, num_stages=3):
        offs_r = row_block * ROWS + tl.arange(0, ROWS)
        offs = offs_r.to(tl.int64)[:, None] * N + offs_n[None, :]
        sums += tl.load(x_ptr + offs, mask=(offs_r < rows)[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_n, tl.sum(sums, 0), mask=mask_n)


@triton.jit(do_not_specialize=["tokens"])
def column_sums_kernel(x_ptr, partial_ptr, tokens, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (g, c) takes the rows' blocks g, g + G, … in the columns of block c, and writes row g there."""
    g = tl.program_id(0)
    _sum_rows(x_ptr, partial_ptr + g * N, tokens, g, tl.num_programs(0), tl.program_id(1), N, ROWS, BLOCK_N)


def partial_sums(x_TN: Tensor) -> Tensor:
    """(G, N) in float32: what is left to be added."""
    tokens, columns = x_TN.shape
    blocks = triton.cdiv(columns, BLOCK_N)
    programs = max(1, min(triton.cdiv(tokens, ROWS), multiprocessors(x_TN.device) * PROGRAMS // blocks))
    partial_GN = x_TN.new_empty(programs, columns, dtype=float32)
    launch_kernel(
        column_sums_kernel, (programs, blocks), x_TN.contiguous(), partial_GN, tokens,
        N=columns, ROWS=ROWS, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return partial_GN


@triton.jit(do_not_specialize=["rows_0", "rows_1", "rows_2", "rows_3"])
def sum_rows_kernel(
    x_0_ptr, x_1_ptr, x_2_ptr, x_3_ptr, out_0_ptr, out_1_ptr, out_2_ptr, out_3_ptr, rows_0, rows_1, rows_2, rows_3,
    N_0: tl.constexpr, N_1: tl.constexpr, N_2: tl.constexpr, N_3: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The blocks of each x's columns, one x after the other."""
    block = tl.program_id(0)
    END_0: tl.constexpr = (N_0 + BLOCK_N - 1) // BLOCK_N
    END_1: tl.constexpr = END_0 + (N_1 + BLOCK_N - 1) // BLOCK_N
    END_2: tl.constexpr = END_1 + (N_2 + BLOCK_N - 1) // BLOCK_N
    if block < END_0:
        _sum_rows(x_0_ptr, out_0_ptr, rows_0, 0, 1, block, N_0, ROWS, BLOCK_N)
    elif block < END_1:
        _sum_rows(x_1_ptr, out_1_ptr, rows_1, 0, 1, block - END_0, N_1, ROWS, BLOCK_N)
    elif block < END_2:
        _sum_rows(x_2_ptr, out_2_ptr, rows_2, 0, 1, block - END_1, N_2, ROWS, BLOCK_N)
    else:
        _sum_rows(x_3_ptr, out_3_ptr, rows_3, 0, 1, block - END_2, N_3, ROWS, BLOCK_N)


def sum_rows(partials: Sequence[Tensor]) -> list[Tensor]:
    """Of one to four float32 tensors (G, …) the sums (…)."""
    outs = [partial.new_empty(partial.shape[1:]) for partial in partials]
    named: dict[str, Any] = {}
    for i in range(4):
        there = i < len(partials)
        named[f"x_{i}_ptr"] = partials[i].contiguous() if there else outs[0]
        named[f"out_{i}_ptr"] = outs[i if there else 0]
        named[f"rows_{i}"], named[f"N_{i}"] = (partials[i].shape[0], outs[i].numel()) if there else (0, 0)
    blocks = sum(triton.cdiv(out.numel(), SUM_BLOCK_N) for out in outs)
    launch_kernel(sum_rows_kernel, (blocks,), **named, ROWS=SUM_ROWS, BLOCK_N=SUM_BLOCK_N, num_warps=4)
    return outs
