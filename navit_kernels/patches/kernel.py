"""Pixels to packed patches in one launch, and the way back.

Token t is the patch (row, column) of image s; its value number p = (c, p1, p2) is the pixel at

    offsets[s] + (c · height + row · patch_size + p1) · width + column · patch_size + p2

    patch = (pixel − centre[c]) · scale[c]     scale = 1 / (255 · std), centre = 255 · mean; float pixels: without 255
    unit  = (patch − Σ patch / P) · rstd     rstd = rsqrt(Σ (patch − Σ patch / P)² / P + eps)
    value = unit · weight + bias             with a LayerNorm, otherwise value = patch

Backward, with d_unit = weight · d_value:

    d_patch = rstd · (d_unit − Σ d_unit / P − unit · Σ (d_unit · unit) / P)        d_pixel = scale[c] · d_patch
    d_weight = Σ_tokens d_value · unit       d_bias = Σ_tokens d_value

A pixel belongs to one patch, so d_pixel has one writer; pixels of patches that are not kept get zero. The sums over
tokens run over each program's own rows, then over the programs: no atomics, the same bits every time.

Dehghani et al.: Patch n' Pack: NaViT (2023), arXiv 2307.06304.
T tokens (kept patches), S segments (images), C channels, P patch values, G programs, N parameter gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._jit import launch_kernel, segment_of


@triton.jit
def _locate(
    offs_t, mask_t, offsets_ptr, sizes_ptr, cu_seqlens_ptr, coords_ptr, segments,
    P: tl.constexpr, PATCH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """First pixel of each token's patch (int64), its image's height and width, and whether the image has that patch."""
    if coords_ptr is not None:
        offs_s = segment_of(offs_t, mask_t, cu_seqlens_ptr, segments)
        offset = tl.load(offsets_ptr + offs_s, mask=mask_t, other=0)
        end = tl.load(cu_seqlens_ptr + offs_s + 1, mask=mask_t, other=0)
        row = tl.load(coords_ptr + 2 * offs_t.to(tl.int64), mask=mask_t, other=0)
        column = tl.load(coords_ptr + 2 * offs_t.to(tl.int64) + 1, mask=mask_t, other=0)
        inside = mask_t & (offs_t < end) & (row >= 0) & (column >= 0)
        height = tl.load(sizes_ptr + 2 * offs_s, mask=mask_t, other=0)
        width = tl.load(sizes_ptr + 2 * offs_s + 1, mask=mask_t, other=0)
    else:
        first_value = offs_t.to(tl.int64) * P  # images have no gaps, so tokens and pixels count alike
        offs_s = segment_of(first_value, mask_t, offsets_ptr, segments)
        offset = tl.load(offsets_ptr + offs_s, mask=mask_t, other=0)
        height = tl.load(sizes_ptr + 2 * offs_s, mask=mask_t, other=0)
        width = tl.load(sizes_ptr + 2 * offs_s + 1, mask=mask_t, other=0)
        place = ((first_value - offset) // P).to(tl.int32)
        columns = tl.maximum(width // PATCH, 1)
        row = place // columns
        column = place % columns
        inside = mask_t
    inside &= (row < height // PATCH) & (column < width // PATCH)
    first_pixel = offset + row.to(tl.int64) * (PATCH * width) + column * PATCH
    return tl.multiple_of(first_pixel, ALIGNED), height, tl.multiple_of(width, ALIGNED), inside


@triton.jit
def _per_channel(channel, v0, v1, v2, v3):
    return tl.where(channel == 0, v0, tl.where(channel == 1, v1, tl.where(channel == 2, v2, v3)))


@triton.jit
def _pixel_offsets(first_pixel, height, width, offs_p, PATCH: tl.constexpr):
    """Offsets of the pixels of each patch [ROWS, BLOCK_P] and the channels of offs_p."""
    channel = offs_p // (PATCH * PATCH)
    line = offs_p // PATCH % PATCH
    lines = channel[None, :] * height[:, None] + line[None, :]  # from the patch's first line
    return first_pixel[:, None] + (lines * width[:, None] + (offs_p % PATCH)[None, :]), channel


@triton.jit
def _unit(patch, mask_p, eps, P: tl.constexpr):
    """Normalize each patch; also rstd."""
    centred = tl.where(mask_p[None, :], patch - (tl.sum(patch, 1) / P)[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / P + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["tokens", "segments"])
def forward_kernel(
    pixels_ptr, offsets_ptr, sizes_ptr, cu_seqlens_ptr, coords_ptr, weight_ptr, bias_ptr, patches_ptr,
    tokens, segments, eps, scale_0, scale_1, scale_2, scale_3, centre_0, centre_1, centre_2, centre_3,
    P: tl.constexpr, PATCH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_t = offs_t < tokens
    first_pixel, height, width, inside = _locate(
        offs_t, mask_t, offsets_ptr, sizes_ptr, cu_seqlens_ptr, coords_ptr, segments, P, PATCH, ALIGNED
    )

    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    values = ()
    for block in tl.static_range(BLOCKS):
        offs_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        offs, channel = _pixel_offsets(first_pixel, height, width, offs_p, PATCH)
        mask = inside[:, None] & (offs_p < P)[None, :]
        pixel = tl.load(pixels_ptr + offs, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK_P]
        scale = _per_channel(channel, scale_0, scale_1, scale_2, scale_3)
        centre = _per_channel(channel, centre_0, centre_1, centre_2, centre_3)
        values += (tl.where(mask, (pixel - centre[None, :]) * scale[None, :], 0.0),)

    if weight_ptr is not None:
        mean = tl.zeros([ROWS], tl.float32)
        for block in tl.static_range(BLOCKS):
            mean += tl.sum(values[block], 1) / P
        square = tl.zeros([ROWS], tl.float32)
        for block in tl.static_range(BLOCKS):
            mask_p = block * BLOCK_P + tl.arange(0, BLOCK_P) < P
            centred = tl.where(mask_p[None, :], values[block] - mean[:, None], 0.0)
            square += tl.sum(centred * centred, 1)
        rstd = 1 / tl.sqrt_rn(square / P + eps)

    for block in tl.static_range(BLOCKS):
        offs_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        value = values[block]
        if weight_ptr is not None:
            value = (value - mean[:, None]) * rstd[:, None]
            value *= tl.load(weight_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[None, :]
            if bias_ptr is not None:
                value += tl.load(bias_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[None, :]
            value = tl.where(inside[:, None], value, 0.0)
        to = patches_ptr + offs_t.to(tl.int64)[:, None] * P + offs_p[None, :]
        tl.store(to, value.to(patches_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_p[None, :])


@triton.jit(do_not_specialize=["tokens", "segments"])
def backward_kernel(
    d_patches_ptr, pixels_ptr, offsets_ptr, sizes_ptr, cu_seqlens_ptr, coords_ptr, weight_ptr,
    d_pixels_ptr, d_weight_ptr, d_bias_ptr,
    tokens, segments, eps, scale_0, scale_1, scale_2, scale_3, centre_0, centre_1, centre_2, centre_3,
    P: tl.constexpr, PATCH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Program g takes the blocks g, g + G, … of ROWS tokens and writes row g of the partial sums."""
    if weight_ptr is not None:  # then BLOCK_P covers P
        offs_p = tl.arange(0, BLOCK_P)
        weight = tl.load(weight_ptr + offs_p, mask=offs_p < P, other=0.0).to(tl.float32)
        d_weight = tl.zeros([BLOCK_P], tl.float32)
        d_bias = tl.zeros([BLOCK_P], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        offs_t = block * ROWS + tl.arange(0, ROWS)
        mask_t = offs_t < tokens
        first_pixel, height, width, inside = _locate(
            offs_t, mask_t, offsets_ptr, sizes_ptr, cu_seqlens_ptr, coords_ptr, segments, P, PATCH, ALIGNED
        )
        for start in tl.static_range(0, P, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask_p = offs_p < P
            mask = inside[:, None] & mask_p[None, :]
            offs, channel = _pixel_offsets(first_pixel, height, width, offs_p, PATCH)
            scale = _per_channel(channel, scale_0, scale_1, scale_2, scale_3)
            offs_d = offs_t.to(tl.int64)[:, None] * P + offs_p[None, :]
            d_value = tl.load(d_patches_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_P]

            if weight_ptr is not None:
                pixel = tl.load(pixels_ptr + offs, mask=mask, other=0).to(tl.float32)
                centre = _per_channel(channel, centre_0, centre_1, centre_2, centre_3)
                unit, rstd = _unit(tl.where(mask, (pixel - centre[None, :]) * scale[None, :], 0.0), mask_p, eps, P)
                d_weight += tl.sum(d_value * unit, 0)
                d_bias += tl.sum(d_value, 0)
                d_unit = d_value * weight[None, :]
                d_value = d_unit - (tl.sum(d_unit, 1) / P)[:, None] - unit * (tl.sum(d_unit * unit, 1) / P)[:, None]
                d_value *= rstd[:, None]

            if d_pixels_ptr is not None:
                d_pixel = d_value * scale[None, :]
                tl.store(d_pixels_ptr + offs, d_pixel.to(d_pixels_ptr.dtype.element_ty), mask=mask)

    if weight_ptr is not None:
        offs_p = tl.arange(0, BLOCK_P)
        offs = tl.program_id(0).to(tl.int64) * STRIDE + offs_p
        tl.store(d_weight_ptr + offs, d_weight, mask=offs_p < P)
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + offs, d_bias, mask=offs_p < P)


PROGRAMS = 512  # of the backward's sums over tokens, the same on every GPU: so are the sums


def choose_config(values: int, patch_size: int, whole: bool = False) -> dict[str, int]:
    """Launch choice by patch. whole: a block covers a patch, as sums over tokens need.

    H100, uint8 to bfloat16, 65,536 patches, µs: 16 × 16 on pt 59 (of 12 choices 59 to 63), 14 × 14 on ft 53 (blocks of
    128 values 58 to 74, of 32 116 to 151).
    """
    padded = max(triton.next_power_of_2(values), 16)
    block = padded if whole else min(padded, 256)
    aligned = patch_size & -patch_size  # the power of two that divides every side and every image's start
    return {
        "PATCH": patch_size,
        "P": values,
        "ALIGNED": min(aligned, 8),
        "BLOCK_P": block,
        "ROWS": max(1, 4096 // padded) if whole else max(1, min(2048 // block, 8192 // padded)),
        "num_warps": 4,
    }


def _scales(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """scale of four channels, then centre of four channels."""
    range_ = 1.0 if pixels.is_floating_point() else 255.0
    unused = [0.0] * (4 - len(std))
    scales = [1 / (range_ * deviation) for deviation in std]
    centres = [range_ * value for value in mean]
    return [*scales, *unused, *centres, *unused]


def patchify(
    pixels: Tensor,
    offsets_S: Tensor,
    sizes_S2: Tensor,
    channels: int,
    cu_seqlens: Tensor | None,
    coords_T2: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    weight_P: Tensor | None,
    bias_P: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return (T, P) patches; all of them where coords is None."""
    values = channels * patch_size**2
    tokens = pixels.shape[0] // values if coords_T2 is None else coords_T2.shape[0]
    patches_TP = pixels.new_empty(tokens, values, dtype=dtype)
    if tokens:
        config = choose_config(values, patch_size)
        launch_kernel(
            forward_kernel, (triton.cdiv(tokens, config["ROWS"]),),
            pixels, offsets_S, sizes_S2, cu_seqlens, coords_T2, weight_P, bias_P, patches_TP,
            tokens, offsets_S.shape[0], eps, *_scales(pixels, mean, std), **config,
        )  # fmt: skip
    return patches_TP


def patchify_backward(
    d_patches_TP: Tensor,
    pixels: Tensor,
    offsets_S: Tensor,
    sizes_S2: Tensor,
    channels: int,
    cu_seqlens: Tensor | None,
    coords_T2: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    weight_P: Tensor | None,
    has_bias: bool,
    eps: float,
    wants_pixels: bool,
) -> tuple[Tensor, Tensor]:
    """Return d_pixels (empty unless wanted) and in float32 the rows d_weight and d_bias (as far as there are such)."""
    tokens, values = d_patches_TP.shape
    d_pixels = torch.zeros_like(pixels) if wants_pixels else pixels.new_empty(0)
    config = choose_config(values, patch_size, whole=weight_P is not None)
    blocks = triton.cdiv(tokens, config["ROWS"])
    programs = blocks if weight_P is None else min(blocks, PROGRAMS)
    sums = 0 if weight_P is None else 1 + has_bias
    partial_GNP = d_patches_TP.new_empty(programs, sums, values, dtype=torch.float32)
    partial_NGP = partial_GNP.transpose(0, 1)
    if tokens:
        launch_kernel(
            backward_kernel, (programs,),
            d_patches_TP.contiguous(), pixels, offsets_S, sizes_S2, cu_seqlens, coords_T2, weight_P,
            d_pixels if wants_pixels else None, partial_NGP[0] if sums else None, partial_NGP[1] if sums > 1 else None,
            tokens, offsets_S.shape[0], eps, *_scales(pixels, mean, std), **config, STRIDE=partial_GNP.stride(0),
        )  # fmt: skip
    return d_pixels, partial_GNP.sum(0)
