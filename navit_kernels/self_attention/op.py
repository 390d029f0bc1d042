"""varlen_attention: the public function. T tokens, H heads, D head width, S segments (images)."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_cu_seqlens, check_dtype, check_option, check_same, check_shape, fail
from ..head_norm import HeadNorm, check_head_norm
from ..plan import PackPlan
from . import reference


def varlen_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    softmax_scale: float | None = None,
    rope: None = None,
    plan: PackPlan | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    out_THD, lse_HT = reference.varlen_attention(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm=q_norm, k_norm=k_norm, softmax_scale=softmax_scale
    )
    return (out_THD, lse_HT.detach()) if return_lse else out_THD
