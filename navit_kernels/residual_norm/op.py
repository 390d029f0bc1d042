"""add_norm: checks, registration, autograd. T tokens, S segments (images), E model width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_dtype, check_option, check_same, check_shape, fail
from .._direct import define, direct, skips_dispatcher
from . import reference

BACKENDS = ("auto", "reference", "triton")
KINDS = ("layer_norm", "rms_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if backend == "reference" or (backend == "auto" and x_TE.device.type == "cpu"):
        return reference.add_norm(
            x_TE, branch_TE, weight_E, bias_E, kind=kind, eps=eps, layer_scale_E=layer_scale_E,
            keep_scale_S=keep_scale_S, cu_seqlens=cu_seqlens, out_dtype=out_dtype,
        )  # fmt: skip
    check_dtype("x", x_TE, DTYPES)
    if branch_TE is not None:
        check_dtype("branch", branch_TE, DTYPES)
    out_dtype = out_dtype or (x_TE if branch_TE is None else branch_TE).dtype
    run = _add_norm_directly if skips_dispatcher(x_TE) else _add_norm
    x_new_TE, normed_TE, _ = run(
        x_TE, branch_TE, weight_E, bias_E, layer_scale_E, keep_scale_S, cu_seqlens, kind == "layer_norm", eps, out_dtype
    )
    return x_TE if branch_TE is None else x_new_TE, normed_TE


def _forward_kernel(
    x_TE: Tensor, branch_TE: Tensor | None, weight_E: Tensor, bias_E: Tensor | None, layer_scale_E: Tensor | None,
    keep_scale_S: Tensor | None, cu_seqlens: Tensor | None, centred: bool, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import kernel

    return kernel.add_norm(
        x_TE, branch_TE, weight_E, bias_E, layer_scale_E, keep_scale_S, cu_seqlens, centred, eps, out_dtype
    )


_add_norm = define("add_norm", _forward_kernel)


@torch.library.register_fake("navit_kernels::add_norm")
def _(x_TE, branch_TE, weight_E, bias_E, layer_scale_E, keep_scale_S, cu_seqlens, centred, eps, out_dtype):  # type: ignore[no-untyped-def]
    tokens, width = x_TE.shape
    x_new_TE = x_TE.new_empty((0, width) if branch_TE is None else (tokens, width))
    stats_RT = x_TE.new_empty(1 + centred + (keep_scale_S is not None), tokens, dtype=torch.float32)
    return x_new_TE, x_TE.new_empty(tokens, width, dtype=out_dtype), stats_RT


def _backward_kernel(
    d_x_new_TE: Tensor | None, d_normed_TE: Tensor, x_new_TE: Tensor, stats_RT: Tensor, branch_TE: Tensor | None,
    weight_E: Tensor, layer_scale_E: Tensor | None, centred: bool, has_bias: bool, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .._column_sums import sum_rows
    from . import kernel

    dx_TE, dbranch_TE, partial_GNE = kernel.add_norm_backward(
        d_x_new_TE, d_normed_TE, x_new_TE, stats_RT, branch_TE, weight_E, layer_scale_E, centred, has_bias, branch_dtype
    )
    (parameters_NE,) = sum_rows([partial_GNE])
    return dx_TE, dx_TE.new_empty(0, dx_TE.shape[1]) if dbranch_TE is None else dbranch_TE, parameters_NE


_add_norm_backward = define("add_norm_backward", _backward_kernel)


@torch.library.register_fake("navit_kernels::add_norm_backward")
def _(d_x_new_TE, d_normed_TE, x_new_TE, stats_RT, branch_TE, weight_E, layer_scale_E, centred, has_bias, branch_dtype):  # type: ignore[no-untyped-def]
    tokens, width = x_new_TE.shape
    dbranch_TE = x_new_TE.new_empty((0, width) if branch_dtype is None else (tokens, width), dtype=branch_dtype)
    parameters_NE = x_new_TE.new_empty(1 + has_bias + (layer_scale_E is not None), width, dtype=torch.float32)
    return x_new_TE.new_empty(tokens, width), dbranch_TE, parameters_NE


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TE, branch_TE, weight_E, bias_E, layer_scale_E, keep_scale_S, _, ctx.centred, _, _ = inputs
    x_new_TE, _, stats_RT = output
    ctx.has_branch, ctx.bias_dtype = branch_TE is not None, None if bias_E is None else bias_E.dtype
    scaled = layer_scale_E is not None or keep_scale_S is not None
    ctx.branch_dtype = branch_TE.dtype if ctx.has_branch and (scaled or branch_TE.dtype != x_TE.dtype) else None
    ctx.save_for_backward(
        x_new_TE if ctx.has_branch else x_TE,
        stats_RT,
        None if layer_scale_E is None else branch_TE,
        weight_E,
        layer_scale_E,
    )
    ctx.set_materialize_grads(False)


def _gradients(
    run: Callable[..., Any], ctx: Any, d_x_new_TE: Tensor | None, d_normed_TE: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    x_new_TE, stats_RT, branch_TE, weight_E, layer_scale_E = ctx.saved_tensors
    dx_TE, dbranch_TE, parameters_NE = run(
        d_x_new_TE if ctx.has_branch else None,
        torch.zeros_like(x_new_TE) if d_normed_TE is None else d_normed_TE,
        x_new_TE, stats_RT, branch_TE, weight_E, layer_scale_E,
        ctx.centred, ctx.bias_dtype is not None, ctx.branch_dtype,
    )  # fmt: skip
    return (
        dx_TE,
        None if not ctx.has_branch else dx_TE if ctx.branch_dtype is None else dbranch_TE,
        parameters_NE[0].to(weight_E.dtype),
        None if ctx.bias_dtype is None else parameters_NE[1].to(ctx.bias_dtype),
        None if layer_scale_E is None else parameters_NE[-1].to(layer_scale_E.dtype),
        *(None,) * 5,
    )


torch.library.register_autograd(
    "navit_kernels::add_norm", functools.partial(_gradients, _add_norm_backward), setup_context=_setup_context
)
_add_norm_directly = direct(_forward_kernel, _setup_context, functools.partial(_gradients, _backward_kernel))
