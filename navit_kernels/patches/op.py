"""patchify: checks, registration, autograd.

T tokens (kept patches), S images, C channels, P patch values = C · patch_size².
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_dtype, check_option, check_same, check_shape, fail
from .._direct import define, direct, skips_dispatcher
from . import reference
from .pixels import KeptPatches, PixelBuffer

BACKENDS = ("auto", "reference", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patchify(
    images: Sequence[Tensor] | PixelBuffer,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    keep: KeptPatches | None = None,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Cut images of any sizes into patches, scale and normalize them, and pack them in one tensor.

        value = (pixel / 255 − mean[channel]) / std[channel]          uint8 images; float images are not divided
        then, with norm, LayerNorm over the P values of each patch

    images: (C, H, W) tensors of one dtype (uint8 or float), device and C in 1..4, or a PixelBuffer. Both sides of every
        image are multiples of patch_size; a PixelBuffer on a GPU is trusted in that (reading its sizes would wait).
    patch_size: pixels, 1 to 32. mean, std: C floats each, in units of the scaled pixel.
    keep: which patches to take, in packed order; by default all, image after image, rows from the top, each from the
        left. Other patches are never read. On a GPU, patches outside their image give zeros.
    norm: (weight (P,), bias (P,) or None, eps) of a LayerNorm in the same pass.
    dtype: of the result; arithmetic is at least float32.
    backend: "auto" runs the reference on CPU tensors and the kernel on CUDA tensors.

    Returns (T, P), the values of a patch flattened (c, p1, p2). Tokens beyond the last image (a buffer longer than its
    images) are zero. Differentiable in float pixels and in norm's weight and bias.
    """
    if not isinstance(patch_size, int) or not 1 <= patch_size <= 32:
        fail("patch_size", "an int from 1 to 32", patch_size)
    if not isinstance(images, PixelBuffer):
        _check_sides([tuple(image.shape[-2:]) for image in images], patch_size)
        images = PixelBuffer.from_images(images)
    _check_buffer(images, patch_size)
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != images.channels:
            fail(name, f"{images.channels} floats, one a channel", numbers)
    if keep is not None:
        check_shape("keep.coords_T2", keep.coords_T2, (None, 2), "(T, 2)")
        check_dtype("keep.coords_T2", keep.coords_T2, (torch.int32,))
        check_same("keep.coords_T2", keep.coords_T2, "pixels", images.pixels, dtype=False)
        check_cu_seqlens("keep.cu_seqlens", keep.cu_seqlens, "keep.coords_T2", keep.coords_T2)
        check_shape("keep.cu_seqlens", keep.cu_seqlens, (images.offsets_S.shape[0] + 1,), "(S + 1,)")
    if norm is not None:
        for name, tensor in (("norm weight", norm[0]), ("norm bias", norm[1])):
            if tensor is not None:
                check_shape(name, tensor, (images.channels * patch_size**2,), "(P,)")
                check_same(name, tensor, "pixels", images.pixels, dtype=False)
    check_option("dtype", dtype, FLOATS)
    check_option("backend", backend, BACKENDS)
    if backend == "reference" or (backend == "auto" and images.pixels.device.type == "cpu"):
        return reference.patchify(images, patch_size, mean, std, keep, norm, dtype)
    check_dtype("pixels", images.pixels, (torch.uint8, *FLOATS[:3]))
    check_option("dtype", dtype, FLOATS[:3])
    weight_P, bias_P, eps = norm or (None, None, 0.0)
    cu_seqlens, coords_T2 = (None, None) if keep is None else (keep.cu_seqlens, keep.coords_T2.contiguous())
    run = _patchify_directly if skips_dispatcher(images.pixels) else _patchify
    return run(
        images.pixels.contiguous(), images.offsets_S, images.sizes_S2.contiguous(), images.channels, cu_seqlens,
        coords_T2, patch_size, [*mean], [*std], weight_P, bias_P, eps, dtype,
    )  # fmt: skip


def _check_buffer(images: PixelBuffer, patch_size: int) -> None:
    check_shape("pixels", images.pixels, (None,), "(N,)")
    check_dtype("pixels", images.pixels, (torch.uint8, *FLOATS))
    check_shape("offsets_S", images.offsets_S, (None,), "(S,)")
    check_dtype("offsets_S", images.offsets_S, (torch.int64,))
    check_shape("sizes_S2", images.sizes_S2, (images.offsets_S.shape[0], 2), "(S, 2)")
    check_dtype("sizes_S2", images.sizes_S2, (torch.int32,))
    check_same("offsets_S", images.offsets_S, "pixels", images.pixels, dtype=False)
    check_same("sizes_S2", images.sizes_S2, "pixels", images.pixels, dtype=False)
    if not 1 <= images.channels <= 4:
        fail("channels", "from 1 to 4", images.channels)
    if images.sizes_S2.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_sides([(height, width) for height, width in images.sizes_S2.tolist()], patch_size)


def _check_sides(sizes: list[tuple[int, ...]], patch_size: int) -> None:
    for index, (height, width) in enumerate(sizes):
        if height % patch_size or width % patch_size:
            fail(f"images[{index}]", f"of sides that are multiples of the patch size {patch_size}", (height, width))


def _forward_kernel(
    pixels: Tensor, offsets_S: Tensor, sizes_S2: Tensor, channels: int, cu_seqlens: Tensor | None,
    coords_T2: Tensor | None, patch_size: int, mean: Sequence[float], std: Sequence[float],
    weight_P: Tensor | None, bias_P: Tensor | None, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from . import kernel

    return kernel.patchify(
        pixels,
        offsets_S,
        sizes_S2,
        channels,
        cu_seqlens,
        coords_T2,
        patch_size,
        mean,
        std,
        weight_P,
        bias_P,
        eps,
        dtype,
    )


_patchify = define("patchify", _forward_kernel)


@torch.library.register_fake("navit_kernels::patchify")
def _(pixels, offsets_S, sizes_S2, channels, cu_seqlens, coords_T2, patch_size, *others):  # type: ignore[no-untyped-def]
    values = channels * patch_size**2
    tokens = pixels.shape[0] // values if coords_T2 is None else coords_T2.shape[0]
    return pixels.new_empty(tokens, values, dtype=others[-1])


def _backward_kernel(
    d_patches_TP: Tensor, pixels: Tensor, offsets_S: Tensor, sizes_S2: Tensor, channels: int,
    cu_seqlens: Tensor | None, coords_T2: Tensor | None, patch_size: int, mean: Sequence[float], std: Sequence[float],
    weight_P: Tensor | None, has_bias: bool, eps: float, wants_pixels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import kernel

    return kernel.patchify_backward(
        d_patches_TP, pixels, offsets_S, sizes_S2, channels, cu_seqlens, coords_T2, patch_size, mean, std,
        weight_P, has_bias, eps, wants_pixels,
    )  # fmt: skip


_patchify_backward = define("patchify_backward", _backward_kernel)


@torch.library.register_fake("navit_kernels::patchify_backward")
def _(d_patches_TP, pixels, *others):  # type: ignore[no-untyped-def]
    weight_P, has_bias, _, wants_pixels = others[-4:]
    sums = 0 if weight_P is None else 1 + has_bias
    d_norm_NP = d_patches_TP.new_empty(sums, d_patches_TP.shape[1], dtype=torch.float32)
    return torch.empty_like(pixels) if wants_pixels else pixels.new_empty(0), d_norm_NP


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, offsets_S, sizes_S2, channels, cu_seqlens, coords_T2, patch_size, mean, std, weight_P, bias_P, eps, _ = (
        inputs
    )
    ctx.save_for_backward(pixels, offsets_S, sizes_S2, cu_seqlens, coords_T2, weight_P)
    ctx.constants = channels, patch_size, mean, std, eps
    ctx.bias_dtype = None if bias_P is None else bias_P.dtype


def _gradients(run: Callable[..., Any], ctx: Any, d_patches_TP: Tensor) -> tuple[Tensor | None, ...]:
    pixels, offsets_S, sizes_S2, cu_seqlens, coords_T2, weight_P = ctx.saved_tensors
    channels, patch_size, mean, std, eps = ctx.constants
    wants_pixels, has_bias = ctx.needs_input_grad[0], ctx.bias_dtype is not None
    d_pixels, d_norm_NP = run(
        d_patches_TP, pixels, offsets_S, sizes_S2, channels, cu_seqlens, coords_T2, patch_size, mean, std,
        weight_P, has_bias, eps, wants_pixels,
    )  # fmt: skip
    d_weight_P = None if weight_P is None else d_norm_NP[0].to(weight_P.dtype)
    d_bias_P = d_norm_NP[1].to(ctx.bias_dtype) if has_bias else None
    return d_pixels if wants_pixels else None, *(None,) * 8, d_weight_P, d_bias_P, None, None


torch.library.register_autograd(
    "navit_kernels::patchify", functools.partial(_gradients, _patchify_backward), setup_context=_setup_context
)
_patchify_directly = direct(_forward_kernel, _setup_context, functools.partial(_gradients, _backward_kernel))
