"""pool_tokens and attention_pool: checks and dispatch.

T tokens, S segments (images), Q learned queries, H heads, D head width, E model width.
"""

from __future__ import annotations

from torch import Tensor

from .._checks import check_cu_seqlens, check_option, check_same, check_shape
from ..head_norm import HeadNorm, check_head_norm
from . import reference

BACKENDS = ("auto", "reference", "triton")
MODES = ("mean", "max", "first")


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
    return reference.pool_tokens(x_TE, cu_seqlens, mode)


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
    return reference.attention_pool(
        query_QHD.to(k_THD.dtype), k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, softmax_scale=softmax_scale
    )
