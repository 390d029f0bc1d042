"""Residual addition and normalization in one pass, forward and backward.

Per token, over its E channels, with keep one number per image and g the layer scale (each 1 when absent):

    x_new = x + keep · g · branch                                  rounded to x's dtype
    mean  = Σ x_new / E  (0 for "rms_norm")                        rstd = rsqrt(Σ (x_new − mean)² / E + eps)
    unit  = (x_new − mean) · rstd                                  normed = unit · weight + bias

Backward, with d_unit = weight · d_normed (the term Σ d_unit is absent for "rms_norm"):

    dx      = d_x_new + rstd · (d_unit − Σ d_unit / E − unit · Σ (d_unit · unit) / E)
    dbranch = keep · g · dx                 dg = Σ_tokens keep · branch · dx
    dweight = Σ_tokens d_normed · unit      dbias = Σ_tokens d_normed      dlinear_bias = Σ_tokens dbranch

The sums over tokens run in float32 over each program's own rows, then over the programs: no atomics, the same bits
every time. Where dbranch equals dx it is not written a second time. The backward reads x_new, per token rstd, mean and
keep, and branch for dg alone.

Ba, Kiros, Hinton: Layer Normalization (2016), arXiv 1607.06450.
T tokens, S segments (images), E model width, G programs, N parameter gradients.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._jit import BoundKernel, multiprocessors, segment_of


@triton.jit
def _load_tile(ptr, offs_t, offs_e, mask_t, mask_e, E: tl.constexpr):
    offs = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    return tl.load(ptr + offs, mask=mask_t[:, None] & mask_e[None, :], other=0.0).to(tl.float32)  # [ROWS, BLOCK_E]


@triton.jit
def _store_tile(ptr, tile, offs_t, offs_e, mask_t, mask_e, E: tl.constexpr):
    offs = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    tl.store(ptr + offs, tile.to(ptr.dtype.element_ty), mask=mask_t[:, None] & mask_e[None, :])


@triton.jit(do_not_specialize=["tokens", "segments"])
def forward_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, layer_scale_ptr, keep_scale_ptr, cu_seqlens_ptr,
    x_new_ptr, normed_ptr, stats_ptr,
    tokens, segments, eps,
    CENTRED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """stats: rows of numbers per token: rstd, mean (if CENTRED) and keep (if there is a keep_scale)."""
    offs_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < tokens
    mask_e = offs_e < E
    tokens_64 = tokens.to(tl.int64)

    x = _load_tile(x_ptr, offs_t, offs_e, mask_t, mask_e, E)  # [ROWS, BLOCK_E]
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)  # [BLOCK_E]
    if branch_ptr is not None:
        branch = _load_tile(branch_ptr, offs_t, offs_e, mask_t, mask_e, E)
        if layer_scale_ptr is not None:
            branch *= tl.load(layer_scale_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        if keep_scale_ptr is not None:
            offs_s = segment_of(offs_t, mask_t, cu_seqlens_ptr, segments)
            keep = tl.load(keep_scale_ptr + offs_s, mask=mask_t, other=0.0).to(tl.float32)  # [ROWS]
            branch *= keep[:, None]
            tl.store(stats_ptr + (1 + CENTRED) * tokens_64 + offs_t, keep, mask=mask_t)
        x_new = (x + branch).to(x_new_ptr.dtype.element_ty)
        _store_tile(x_new_ptr, x_new, offs_t, offs_e, mask_t, mask_e, E)
        x = x_new.to(tl.float32)

    if CENTRED:
        mean = tl.sum(x, 1) / E  # [ROWS]
        x = tl.where(mask_e[None, :], x - mean[:, None], 0.0)
        tl.store(stats_ptr + tokens_64 + offs_t, mean, mask=mask_t)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / E + eps)  # [ROWS]
    normed = x * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]

    tl.store(stats_ptr + offs_t, rstd, mask=mask_t)
    _store_tile(normed_ptr, normed, offs_t, offs_e, mask_t, mask_e, E)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    d_x_new_ptr, d_normed_ptr, x_new_ptr, stats_ptr, branch_ptr, weight_ptr, layer_scale_ptr,
    dx_ptr, dbranch_ptr, partials_ptr,
    tokens,
    CENTRED: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, LINEAR_BIAS: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program g takes the blocks g, g + G, … of ROWS tokens and writes the partial sums partials[g], (N, E)."""
    tokens_64 = tokens.to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)  # [BLOCK_E]
    dweight = tl.zeros([BLOCK_E], tl.float32)
    if BIAS:
        dbias = tl.zeros([BLOCK_E], tl.float32)
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        dlayer_scale = tl.zeros([BLOCK_E], tl.float32)
    if LINEAR_BIAS:
        dlinear_bias = tl.zeros([BLOCK_E], tl.float32)

    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        offs_t = block * ROWS + tl.arange(0, ROWS)
        mask_t = offs_t < tokens
        d_normed = _load_tile(d_normed_ptr, offs_t, offs_e, mask_t, mask_e, E)  # [ROWS, BLOCK_E]
        unit = _load_tile(x_new_ptr, offs_t, offs_e, mask_t, mask_e, E)
        rstd = tl.load(stats_ptr + offs_t, mask=mask_t, other=0.0)  # [ROWS]
        if CENTRED:
            unit -= tl.load(stats_ptr + tokens_64 + offs_t, mask=mask_t, other=0.0)[:, None]
        unit *= rstd[:, None]

        d_unit = d_normed * weight[None, :]
        dx = d_unit - unit * (tl.sum(d_unit * unit, 1) / E)[:, None]
        if CENTRED:
            dx -= (tl.sum(d_unit, 1) / E)[:, None]
        dx *= rstd[:, None]
        if d_x_new_ptr is not None:
            dx += _load_tile(d_x_new_ptr, offs_t, offs_e, mask_t, mask_e, E)
        dweight += tl.sum(d_normed * unit, 0)
        if BIAS:
            dbias += tl.sum(d_normed, 0)
        _store_tile(dx_ptr, dx, offs_t, offs_e, mask_t, mask_e, E)

        dbranch = dx
        if dbranch_ptr is not None:
            if KEEP:
                dbranch *= tl.load(stats_ptr + (1 + CENTRED) * tokens_64 + offs_t, mask=mask_t, other=0.0)[:, None]
            if layer_scale_ptr is not None:
                branch = _load_tile(branch_ptr, offs_t, offs_e, mask_t, mask_e, E)
                dlayer_scale += tl.sum(dbranch * branch, 0)
                dbranch *= layer_scale[None, :]
            _store_tile(dbranch_ptr, dbranch, offs_t, offs_e, mask_t, mask_e, E)
        if LINEAR_BIAS:
            dlinear_bias += tl.sum(dbranch, 0)

    SUMS: tl.constexpr = 1 + BIAS + (layer_scale_ptr is not None) + LINEAR_BIAS
    sums_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * (SUMS * E) + offs_e
    tl.store(sums_ptr, dweight, mask=mask_e)
    if BIAS:
        tl.store(sums_ptr + E, dbias, mask=mask_e)
    if layer_scale_ptr is not None:
        tl.store(sums_ptr + (1 + BIAS) * E, dlayer_scale, mask=mask_e)
    if LINEAR_BIAS:
        tl.store(sums_ptr + (SUMS - 1) * E, dlinear_bias, mask=mask_e)


@functools.cache
def choose_config(width: int) -> dict[str, int]:
    """Launch choice by model width: 8 channels of a row a thread, 1024 channels or one row a program.

    H100, bfloat16, widths 768, 1024 and 1152: forward at a copy's bandwidth, as every choice with up to 64 channels a
    thread; backward within 2% of the fastest of 19 (1 to 4 rows, 2 to 8 warps, 4 to 16 programs a multiprocessor),
    of which those with 8 warps a row of 1024 take 1.3 to 2.6 times as long.
    """
    block = max(triton.next_power_of_2(width), 16)
    return {"BLOCK_E": block, "ROWS": max(1, 1024 // block), "num_warps": min(max(block // 256, 4), 16)}


@functools.cache
def bound_forward(width: int, centred: bool) -> BoundKernel:
    return BoundKernel(forward_kernel, CENTRED=centred, E=width, **choose_config(width))


@functools.cache
def bound_backward(width: int, centred: bool, keep: bool, bias: bool, linear_bias: bool) -> BoundKernel:
    stages = 3 if width <= 2048 else 2
    return BoundKernel(
        backward_kernel, CENTRED=centred, KEEP=keep, BIAS=bias, LINEAR_BIAS=linear_bias, E=width, STAGES=stages,
        **choose_config(width),
    )  # fmt: skip


def programs_of_backward(device: torch.device, width: int, biases: int, layer_scale: bool) -> int:
    """G: as many as run at once, since all have the same work; every program costs a row of partial sums.

    Warps for each multiprocessor: of threads with 64, 80 or 102 registers, as further sums take them.
    """
    if device.type == "cpu":  # interpreted
        return 3
    warps = 16 if layer_scale or biases > 1 else 24 if biases else 32
    return multiprocessors(device) * max(1, warps // choose_config(width)["num_warps"])


def add_norm(
    x_TE: Tensor,
    branch_TE: Tensor | None,
    weight_E: Tensor,
    bias_E: Tensor | None,
    layer_scale_E: Tensor | None,
    keep_scale_S: Tensor | None,
    cu_seqlens: Tensor | None,
    centred: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_new (empty without a branch: it would be x), normed, and per token the rows rstd, mean (if centred) and
    keep (if there is a keep_scale)."""
    tokens, width = x_TE.shape
    has_keep = keep_scale_S is not None
    x_new_TE = x_TE.new_empty((0, width) if branch_TE is None else (tokens, width))
    normed_TE = x_TE.new_empty(tokens, width, dtype=out_dtype)
    stats_RT = x_TE.new_empty(1 + centred + has_keep, tokens, dtype=torch.float32)
    if tokens:
        bound = bound_forward(width, centred)
        bound(
            (-(-tokens // bound.bound["ROWS"]),),
            x_ptr=x_TE.contiguous(), branch_ptr=None if branch_TE is None else branch_TE.contiguous(),
            weight_ptr=weight_E, bias_ptr=bias_E, layer_scale_ptr=layer_scale_E, keep_scale_ptr=keep_scale_S,
            cu_seqlens_ptr=cu_seqlens, x_new_ptr=x_new_TE, normed_ptr=normed_TE, stats_ptr=stats_RT, tokens=tokens,
            segments=0 if keep_scale_S is None else keep_scale_S.shape[0], eps=eps,
        )  # fmt: skip
    return x_new_TE, normed_TE, stats_RT


def add_norm_backward(
    d_x_new_TE: Tensor | None,
    d_normed_TE: Tensor,
    x_new_TE: Tensor,
    stats_RT: Tensor,
    branch_TE: Tensor | None,
    weight_E: Tensor,
    layer_scale_E: Tensor | None,
    centred: bool,
    has_bias: bool,
    branch_dtype: torch.dtype | None,
    linear_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dx, dbranch in branch_dtype (None for None: it would be dx), and in float32, to be summed over programs,
    the rows dweight, dbias (if has_bias), dlayer_scale (if there is one) and, if asked for, the gradient of the bias of
    a linear layer whose output the branch is. branch_TE is needed for dlayer_scale alone."""
    tokens, width = x_new_TE.shape
    has_keep, has_layer_scale = stats_RT.shape[0] > 1 + centred, layer_scale_E is not None
    dx_TE = x_new_TE.new_empty(tokens, width)
    dbranch_TE = None if branch_dtype is None else x_new_TE.new_empty(tokens, width, dtype=branch_dtype)
    programs = programs_of_backward(x_new_TE.device, width, has_bias + linear_bias, has_layer_scale)
    sums = 1 + has_bias + has_layer_scale + linear_bias
    partial_GNE = x_new_TE.new_empty(programs, sums, width, dtype=torch.float32)
    bound_backward(width, centred, has_keep, has_bias, linear_bias)(
        (programs,), d_x_new_ptr=None if d_x_new_TE is None else d_x_new_TE.contiguous(),
        d_normed_ptr=d_normed_TE.contiguous(), x_new_ptr=x_new_TE.contiguous(), stats_ptr=stats_RT,
        branch_ptr=branch_TE.contiguous() if branch_TE is not None and has_layer_scale else None, weight_ptr=weight_E,
        layer_scale_ptr=layer_scale_E, dx_ptr=dx_TE, dbranch_ptr=dbranch_TE, partials_ptr=partial_GNE, tokens=tokens,
    )  # fmt: skip
    return dx_TE, dbranch_TE, partial_GNE
