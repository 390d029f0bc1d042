"""Residual addition and normalization in one pass, forward and backward.

Per token, over its E channels, with keep one number per image and g the layer scale (each 1 when absent):

    x_new = x + keep · g · branch                                  rounded to x's dtype
    mean  = Σ x_new / E  (0 for "rms_norm")                        rstd = rsqrt(Σ (x_new − mean)² / E + eps)
    unit  = (x_new − mean) · rstd                                  normed = unit · weight + bias

Backward, with d_unit = weight · d_normed (the term Σ d_unit is absent for "rms_norm"):

    dx      = d_x_new + rstd · (d_unit − Σ d_unit / E − unit · Σ (d_unit · unit) / E)
    dbranch = keep · g · dx                 dg = Σ_tokens keep · branch · dx
    dweight = Σ_tokens d_normed · unit      dbias = Σ_tokens d_normed

The sums over tokens run in float32 over each program's own rows, then over the programs: no atomics, the same bits
every time. Where dbranch equals dx it is not written a second time. The backward reads x_new, per token rstd, mean and
keep, and branch for dg alone.

Ba, Kiros, Hinton: Layer Normalization (2016), arXiv 1607.06450.
T tokens, S segments (images), E model width, G programs, N parameter gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._jit import launch_kernel, multiprocessors, segment_of


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
    x_new_ptr, normed_ptr, rstd_ptr, mean_ptr, keep_ptr,
    tokens, segments, eps,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < tokens
    mask_e = offs_e < E

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
            tl.store(keep_ptr + offs_t, keep, mask=mask_t)
        x_new = (x + branch).to(x_new_ptr.dtype.element_ty)
        _store_tile(x_new_ptr, x_new, offs_t, offs_e, mask_t, mask_e, E)
        x = x_new.to(tl.float32)

    if mean_ptr is not None:
        mean = tl.sum(x, 1) / E  # [ROWS]
        x = tl.where(mask_e[None, :], x - mean[:, None], 0.0)
        tl.store(mean_ptr + offs_t, mean, mask=mask_t)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / E + eps)  # [ROWS]
    normed = x * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]

    tl.store(rstd_ptr + offs_t, rstd, mask=mask_t)
    _store_tile(normed_ptr, normed, offs_t, offs_e, mask_t, mask_e, E)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    d_x_new_ptr, d_normed_ptr, x_new_ptr, rstd_ptr, mean_ptr, keep_ptr, branch_ptr, weight_ptr, layer_scale_ptr,
    dx_ptr, dbranch_ptr, dweight_ptr, dbias_ptr, dlayer_scale_ptr,
    tokens,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Program g takes the blocks g, g + G, … of ROWS tokens and writes row g of the partial sums."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)  # [BLOCK_E]
    dweight = tl.zeros([BLOCK_E], tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros([BLOCK_E], tl.float32)
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        dlayer_scale = tl.zeros([BLOCK_E], tl.float32)

    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        offs_t = block * ROWS + tl.arange(0, ROWS)
        mask_t = offs_t < tokens
        d_normed = _load_tile(d_normed_ptr, offs_t, offs_e, mask_t, mask_e, E)  # [ROWS, BLOCK_E]
        unit = _load_tile(x_new_ptr, offs_t, offs_e, mask_t, mask_e, E)
        rstd = tl.load(rstd_ptr + offs_t, mask=mask_t, other=0.0)  # [ROWS]
        if mean_ptr is not None:
            unit -= tl.load(mean_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
        unit *= rstd[:, None]

        d_unit = d_normed * weight[None, :]
        dx = d_unit - unit * (tl.sum(d_unit * unit, 1) / E)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(d_unit, 1) / E)[:, None]
        dx *= rstd[:, None]
        if d_x_new_ptr is not None:
            dx += _load_tile(d_x_new_ptr, offs_t, offs_e, mask_t, mask_e, E)
        dweight += tl.sum(d_normed * unit, 0)
        if dbias_ptr is not None:
            dbias += tl.sum(d_normed, 0)
        _store_tile(dx_ptr, dx, offs_t, offs_e, mask_t, mask_e, E)

        if dbranch_ptr is not None:
            dbranch = dx
            if keep_ptr is not None:
                dbranch *= tl.load(keep_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
            if layer_scale_ptr is not None:
                branch = _load_tile(branch_ptr, offs_t, offs_e, mask_t, mask_e, E)
                dlayer_scale += tl.sum(dbranch * branch, 0)
                dbranch *= layer_scale[None, :]
            _store_tile(dbranch_ptr, dbranch, offs_t, offs_e, mask_t, mask_e, E)

    offs = tl.program_id(0).to(tl.int64) * STRIDE + offs_e
    tl.store(dweight_ptr + offs, dweight, mask=mask_e)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs, dbias, mask=mask_e)
    if layer_scale_ptr is not None:
        tl.store(dlayer_scale_ptr + offs, dlayer_scale, mask=mask_e)


def choose_config(width: int) -> dict[str, int]:
    """Launch choice by model width: 8 channels of a row a thread, 1024 channels or one row a program.

    H100, bfloat16, widths 768, 1024 and 1152: forward at a copy's bandwidth, as every choice with up to 64 channels a
    thread; backward within 2% of the fastest of 19 (1 to 4 rows, 2 to 8 warps, 4 to 16 programs a multiprocessor),
    of which those with 8 warps a row of 1024 take 1.3 to 2.6 times as long.
    """
    block = max(triton.next_power_of_2(width), 16)
    return {"BLOCK_E": block, "ROWS": max(1, 1024 // block), "num_warps": min(max(block // 256, 4), 16)}


def programs_of_backward(device: torch.device, width: int, bias: bool, layer_scale: bool) -> int:
    """G: as many as run at once, since all have the same work; every program costs a row of partial sums.

    Warps for each multiprocessor: of threads with 64, 80 or 102 registers, as further sums take them.
    """
    if device.type == "cpu":  # interpreted
        return 3
    warps = 16 if layer_scale else 24 if bias else 32
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
        config = choose_config(width)
        launch_kernel(
            forward_kernel, (triton.cdiv(tokens, config["ROWS"]),),
            x_TE.contiguous(), None if branch_TE is None else branch_TE.contiguous(),
            weight_E, bias_E, layer_scale_E, keep_scale_S, cu_seqlens,
            x_new_TE, normed_TE, stats_RT[0], stats_RT[1] if centred else None, stats_RT[-1] if has_keep else None,
            tokens, len(keep_scale_S) if has_keep else 0, eps,
            E=width, **config,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dbranch in branch_dtype (empty for None: it would be dx), and in float32 the rows dweight, dbias (if
    has_bias) and dlayer_scale (if there is one). branch_TE is needed for dlayer_scale alone."""
    tokens, width = x_new_TE.shape
    has_keep, has_layer_scale = len(stats_RT) > 1 + centred, layer_scale_E is not None
    dx_TE = x_new_TE.new_empty(tokens, width)
    dbranch_TE = x_new_TE.new_empty((0, width) if branch_dtype is None else (tokens, width), dtype=branch_dtype)
    programs = programs_of_backward(x_new_TE.device, width, has_bias, has_layer_scale)
    partial_GNE = x_new_TE.new_empty(programs, 1 + has_bias + has_layer_scale, width, dtype=torch.float32)
    partial_NGE = partial_GNE.transpose(0, 1)
    launch_kernel(
        backward_kernel, (programs,),
        None if d_x_new_TE is None else d_x_new_TE.contiguous(), d_normed_TE.contiguous(), x_new_TE.contiguous(),
        stats_RT[0], stats_RT[1] if centred else None, stats_RT[-1] if has_keep else None,
        branch_TE.contiguous() if has_layer_scale else None, weight_E, layer_scale_E,
        dx_TE, None if branch_dtype is None else dbranch_TE,
        partial_NGE[0], partial_NGE[1] if has_bias else None, partial_NGE[-1] if has_layer_scale else None,
        tokens,
        E=width, STAGES=3 if width <= 2048 else 2, STRIDE=partial_GNE.stride(0), **choose_config(width),
    )  # fmt: skip
    return dx_TE, dbranch_TE, partial_GNE.sum(0)
