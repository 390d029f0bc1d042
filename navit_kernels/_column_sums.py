"""Sums over tokens, as the gradient of a bias is one.

    sum[n] = Σ_tokens x[t, n]

Each program adds rows of its own, in float32; its row of partial sums is added to the others'. No atomics: the same
bits every time. T tokens, N columns, G programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from ._jit import launch_kernel, multiprocessors

ROWS, BLOCK_N, PROGRAMS = 16, 256, 8  # of a block; programs a multiprocessor


@triton.jit(do_not_specialize=["tokens"])
def column_sums_kernel(x_ptr, partial_ptr, tokens, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (g, c) takes the rows' blocks g, g + G, … in the columns of block c, and writes row g there."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=3):
        offs_t = block * ROWS + tl.arange(0, ROWS)
        offs = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        sums += tl.load(x_ptr + offs, mask=(offs_t < tokens)[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0) * N + offs_n, tl.sum(sums, 0), mask=mask_n)


def column_sums(x_TN: Tensor) -> Tensor:
    """(N,) in float32."""
    tokens, columns = x_TN.shape
    blocks = triton.cdiv(columns, BLOCK_N)
    programs = max(1, min(triton.cdiv(tokens, ROWS), multiprocessors(x_TN.device) * PROGRAMS // blocks))
    partial_GN = x_TN.new_empty(programs, columns, dtype=float32)
    launch_kernel(
        column_sums_kernel, (programs, blocks), x_TN.contiguous(), partial_GN, tokens,
        N=columns, ROWS=ROWS, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return partial_GN.sum(0)
