"""add_norm: checks and dispatch. T tokens, S segments (images), E model width."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_option, check_same, check_shape, fail
from . import reference

BACKENDS = ("auto", "reference", "triton")
KINDS = ("layer_norm", "rms_norm")


def add_norm(
    x_TE: Tensor,
    branch_TE: Tensor | None,
    weight_E: Tensor,
    bias_E: Tensor | None = None,
    *,
    kind: str = "layer_norm",
    eps: float = 1e-6,
    layer_scale_E: Tensor | None = None,
    keep_scale_S: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalize the sum for the next branch, in one pass.

        x ← x + keep_scale[image] · layer_scale · branch
        normed = (x − mean) · rsqrt(var + eps) · weight + bias         "layer_norm"
        normed = x · rsqrt(mean(x²) + eps) · weight + bias             "rms_norm"

    x_TE: (T, E) residual stream, float32 or 16 bits. branch_TE: (T, E), its dtype may differ from x's, or None: then
        x itself is normalized and returned.
    weight_E, bias_E, layer_scale_E: (E,) or None where the formula can do without.
    keep_scale_S: (S,) per-image stochastic depth, 0 for a dropped image and 1 / (1 − p) for a kept one; no gradient.
        Needs cu_seqlens, (S + 1,) int32: image s owns the tokens cu_seqlens[s] : cu_seqlens[s + 1].
    out_dtype: dtype of normed; by default the branch's, or x's without a branch.
    backend: "auto" runs the reference on CPU tensors and the kernel on CUDA tensors.

    Returns (x, normed), both (T, E). The sum is computed in float32, rounded once to x's dtype, and that is normalized.
    """
    check_shape("x", x_TE, (None, None), "(T, E)")
    width = x_TE.shape[1]
    for name, tensor, shape, legend in (
        ("branch", branch_TE, x_TE.shape, "(T, E)"),
        ("weight", weight_E, (width,), "(E,)"),
        ("bias", bias_E, (width,), "(E,)"),
        ("layer_scale", layer_scale_E, (width,), "(E,)"),
        ("keep_scale", keep_scale_S, (None,), "(S,)"),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape, legend)
            check_same(name, tensor, "x", x_TE, dtype=False)
    check_option("kind", kind, KINDS)
    check_option("backend", backend, BACKENDS)
    if branch_TE is None and (layer_scale_E is not None or keep_scale_S is not None):
        fail("branch", "given where layer_scale or keep_scale is", None)
    if keep_scale_S is not None:
        if cu_seqlens is None:
            fail("cu_seqlens", "given where keep_scale is", None)
        check_cu_seqlens("cu_seqlens", cu_seqlens, "x", x_TE)
        check_shape("keep_scale", keep_scale_S, (cu_seqlens.shape[0] - 1,), "(S,)")
    return reference.add_norm(
        x_TE, branch_TE, weight_E, bias_E, kind=kind, eps=eps, layer_scale_E=layer_scale_E,
        keep_scale_S=keep_scale_S, cu_seqlens=cu_seqlens, out_dtype=out_dtype,
    )  # fmt: skip
