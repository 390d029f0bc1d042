"""Reference: images to packed patches. Plain torch, a loop over images; differentiable in float pixels and norm.

T tokens (kept patches), S images, C channels, P patch values = C · patch_size².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .pixels import KeptPatches, PixelBuffer


def patchify(
    images: PixelBuffer,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    keep: KeptPatches | None = None,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return (T, P) patches, image after image; tokens beyond the last image are zero. See op.patchify."""
    channels, pixels = images.channels, images.pixels
    values = channels * patch_size**2
    compute = torch.promote_types(dtype, torch.float32)
    if pixels.is_floating_point():
        compute = torch.promote_types(compute, pixels.dtype)
    tokens = pixels.numel() // values if keep is None else keep.coords_T2.shape[0]
    starts = None if keep is None else keep.cu_seqlens.tolist()
    picked = [pixels.new_zeros(0, values)]
    for s, (offset, (height, width)) in enumerate(
        zip(images.offsets_S.tolist(), images.sizes_S2.tolist(), strict=True)
    ):
        rows, columns = height // patch_size, width // patch_size
        image = pixels[offset : offset + channels * height * width].view(
            channels, rows, patch_size, columns, patch_size
        )
        grid = image.permute(1, 3, 0, 2, 4)  # (rows, columns, C, p1, p2)
        if keep is not None and starts is not None:
            row, column = keep.coords_T2[starts[s] : starts[s + 1]].long().unbind(1)
            picked.append(grid[row, column].reshape(-1, values))
        else:
            picked.append(grid.reshape(-1, values))
    patches_TCpp = torch.cat(picked).to(compute).view(-1, channels, patch_size, patch_size)
    if not pixels.is_floating_point():
        patches_TCpp = patches_TCpp / 255
    mean_C, std_C = (torch.tensor(list(v), dtype=compute, device=pixels.device).view(-1, 1, 1) for v in (mean, std))
    patches_TP = ((patches_TCpp - mean_C) / std_C).reshape(-1, values)
    if norm is not None:
        weight_P, bias_P, eps = norm
        bias_P = None if bias_P is None else bias_P.to(compute)
        patches_TP = layer_norm(patches_TP, (values,), weight_P.to(compute), bias_P, eps)
    missing = tokens - patches_TP.shape[0]
    return torch.cat([patches_TP, patches_TP.new_zeros(missing, values)]).to(dtype)
