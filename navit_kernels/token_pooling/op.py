"""pool_tokens and attention_pool: checks, registration, autograd.

T tokens, S segments (images), Q learned queries, H heads, D head width, E model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_dtype, check_option, check_same, check_shape
from .._direct import define, direct, skips_dispatcher
from ..head_norm import HeadNorm, check_head_norm
from ..self_attention.reference import head_norm
from . import reference

BACKENDS = ("auto", "reference", "triton")
MODES = ("mean", "max", "first")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pool_tokens(x_TE: Tensor, cu_seqlens: Tensor, mode: str = "mean", *, backend: str = "auto") -> Tensor:
    """Pool each image's tokens into one vector.

    x_TE: (T, E), the tokens of all images, image after image.
    cu_seqlens: (S + 1,) int32 on x's device; image s owns the tokens cu_seqlens[s] : cu_seqlens[s + 1].
    mode: "mean"; "max", whose gradient goes to the first token that attains it; or "first", the image's first token
        (a cls token). An image without tokens gets zeros.
    backend: "auto" runs the reference on CPU tensors and the kernel on CUDA tensors.

    Returns (S, E) in x's dtype.
    """
    check_shape("x", x_TE, (None, None), "(T, E)")
    check_cu_seqlens("cu_seqlens", cu_seqlens, "x", x_TE)
    check_option("mode", mode, MODES)
    check_option("backend", backend, BACKENDS)
    if backend == "reference" or (backend == "auto" and x_TE.device.type == "cpu"):
        return reference.pool_tokens(x_TE, cu_seqlens, mode)
    check_dtype("x", x_TE, DTYPES)
    run = _pool_tokens_directly if skips_dispatcher(x_TE) else _pool_tokens
    return run(x_TE, cu_seqlens, mode)[0]


def attention_pool(
    query_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    *,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pool each image's tokens by learned queries: softmax(scale · norm(query) · norm(k)ᵀ) · v inside the image.

    query_QHD: (Q, H, D) or (H, D) for a single query; every image asks the same queries.
    k_THD, v_THD: (T, H, D), any strides as long as the last axis is contiguous.
    cu_seqlens: (S + 1,) int32 on k's device; image s owns the tokens cu_seqlens[s] : cu_seqlens[s + 1].
    q_norm, k_norm: HeadNorm or None. A k_norm's bias changes nothing (the softmax does not see it): zero gradient.
    softmax_scale: D ** -0.5 by default.
    backend: "auto" runs the reference on CPU tensors and the kernel on CUDA tensors.

    Returns (S, Q, H, D) in v's dtype, or (S, H, D) for an (H, D) query. An image without tokens gets zeros.
    """
    check_shape("k", k_THD, (None, None, None), "(T, H, D)")
    heads, width = k_THD.shape[1:]
    check_shape("v", v_THD, k_THD.shape, "(T, H, D)")
    check_same("v", v_THD, "k", k_THD)
    if query_QHD.dim() == 2:
        pooled_SQHD = attention_pool(
            query_QHD[None], k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm,
            softmax_scale=softmax_scale, backend=backend,
        )  # fmt: skip
        return pooled_SQHD[:, 0]
    check_shape("query", query_QHD, (None, heads, width), "(Q, H, D)")
    check_same("query", query_QHD, "k", k_THD, dtype=False)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "k", k_THD)
    check_head_norm("q_norm", q_norm, "query", query_QHD)
    check_head_norm("k_norm", k_norm, "k", k_THD)
    check_option("backend", backend, BACKENDS)
    if backend == "reference" or (backend == "auto" and k_THD.device.type == "cpu"):
        return reference.attention_pool(
            query_QHD.to(k_THD.dtype), k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    check_dtype("k", k_THD, DTYPES)
    u_QHD = fold_query(query_QHD, q_norm, k_norm, width**-0.5 if softmax_scale is None else softmax_scale)
    norm, eps = ("none", 0.0) if k_norm is None else (k_norm.kind, k_norm.eps)
    run = _attention_pool_directly if skips_dispatcher(k_THD) else _attention_pool
    return run(u_QHD, k_THD, v_THD, cu_seqlens, norm, eps)[0]


def fold_query(query_QHD: Tensor, q_norm: HeadNorm | None, k_norm: HeadNorm | None, scale: float) -> Tensor:
    """u = scale · C(γk ⊙ norm(query)), what raw keys are multiplied with. Few numbers: plain torch, in float64."""
    if q_norm is not None:
        weight, bias = (None if part is None else part.double() for part in (q_norm.weight, q_norm.bias))
        q_norm = HeadNorm(q_norm.kind, weight, bias, q_norm.eps)
    u_QHD = head_norm(query_QHD.double(), q_norm) * scale
    if k_norm is not None:
        if k_norm.weight is not None:
            u_QHD = u_QHD * k_norm.weight.double()
        if k_norm.kind == "layer_norm":
            u_QHD = u_QHD - u_QHD.mean(-1, keepdim=True)
        if k_norm.bias is not None:
            u_QHD = u_QHD + 0.0 * k_norm.bias.double()  # its gradient is zero, not missing
    return u_QHD.float()


def _pool_tokens_kernel(x_TE: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    from . import kernel_segments

    return kernel_segments.pool_tokens(x_TE, cu_seqlens, mode)


_pool_tokens = define("pool_tokens", _pool_tokens_kernel)


@torch.library.register_fake("navit_kernels::pool_tokens")
def _(x_TE, cu_seqlens, mode):  # type: ignore[no-untyped-def]
    segments, width = cu_seqlens.shape[0] - 1, x_TE.shape[1]
    index_SE = x_TE.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)
    return x_TE.new_empty(segments, width), index_SE


def _pool_tokens_backward_kernel(
    dout_SE: Tensor, index_SE: Tensor, cu_seqlens: Tensor, tokens: int, mode: str
) -> Tensor:
    from . import kernel_segments

    return kernel_segments.pool_tokens_backward(dout_SE, index_SE, cu_seqlens, tokens, mode)


_pool_tokens_backward = define("pool_tokens_backward", _pool_tokens_backward_kernel)


@torch.library.register_fake("navit_kernels::pool_tokens_backward")
def _(dout_SE, index_SE, cu_seqlens, tokens, mode):  # type: ignore[no-untyped-def]
    return dout_SE.new_empty(tokens, dout_SE.shape[1])


def _pool_tokens_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    x_TE, cu_seqlens, ctx.mode = inputs
    ctx.tokens = x_TE.shape[0]
    ctx.save_for_backward(output[1], cu_seqlens)


def _pool_tokens_gradient(run: Callable[..., Any], ctx: Any, dout_SE: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return run(dout_SE, *ctx.saved_tensors, ctx.tokens, ctx.mode), None, None


torch.library.register_autograd(
    "navit_kernels::pool_tokens",
    functools.partial(_pool_tokens_gradient, _pool_tokens_backward),
    setup_context=_pool_tokens_context,
)
_pool_tokens_directly = direct(
    _pool_tokens_kernel, _pool_tokens_context, functools.partial(_pool_tokens_gradient, _pool_tokens_backward_kernel)
)


def _attention_pool_kernel(
    u_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.attention_pool(u_QHD, k_THD, v_THD, cu_seqlens, norm, eps)


_attention_pool = define("attention_pool", _attention_pool_kernel)


@torch.library.register_fake("navit_kernels::attention_pool")
def _(u_QHD, k_THD, v_THD, cu_seqlens, norm, eps):  # type: ignore[no-untyped-def]
    shape = (cu_seqlens.shape[0] - 1, *u_QHD.shape)
    out_SQHD, out32_SQHD = v_THD.new_empty(shape), v_THD.new_empty(shape, dtype=torch.float32)
    return out_SQHD, out32_SQHD, v_THD.new_empty(2, *shape[:-1], dtype=torch.float32)


def _attention_pool_backward_kernel(
    dout_SQHD: Tensor, out32_SQHD: Tensor, softmax_2SQH: Tensor, u_QHD: Tensor, k_THD: Tensor, v_THD: Tensor,
    cu_seqlens: Tensor, norm: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import kernel

    return kernel.attention_pool_backward(
        dout_SQHD, out32_SQHD, softmax_2SQH, u_QHD, k_THD, v_THD, cu_seqlens, norm, eps
    )


_attention_pool_backward = define("attention_pool_backward", _attention_pool_backward_kernel)


@torch.library.register_fake("navit_kernels::attention_pool_backward")
def _(dout_SQHD, out32_SQHD, softmax_2SQH, u_QHD, k_THD, v_THD, cu_seqlens, norm, eps):  # type: ignore[no-untyped-def]
    return u_QHD.new_empty(u_QHD.shape), k_THD.new_empty(k_THD.shape), v_THD.new_empty(v_THD.shape)


def _attention_pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u_QHD, k_THD, v_THD, cu_seqlens, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*output[1:], u_QHD, k_THD, v_THD, cu_seqlens)


def _attention_pool_gradient(
    run: Callable[..., Any], ctx: Any, dout_SQHD: Tensor, *_: None
) -> tuple[Tensor | None, ...]:
    return *run(dout_SQHD, *ctx.saved_tensors, ctx.norm, ctx.eps), None, None, None


torch.library.register_autograd(
    "navit_kernels::attention_pool",
    functools.partial(_attention_pool_gradient, _attention_pool_backward),
    setup_context=_attention_pool_context,
)
_attention_pool_directly = direct(
    _attention_pool_kernel,
    _attention_pool_context,
    functools.partial(_attention_pool_gradient, _attention_pool_backward_kernel),
)
