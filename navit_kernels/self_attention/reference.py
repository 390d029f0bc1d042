"""Reference: attention inside each segment, with optional norms of q and k. Plain torch, a loop over segments.

T tokens, H heads, D head width, S segments (images).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..head_norm import HeadNorm


def head_norm(x_THD: Tensor, norm: HeadNorm | None) -> Tensor:
    """Normalize the last axis as HeadNorm's docstring defines it."""
    if norm is None:
        return x_THD
    if norm.kind == "layer_norm":
        x_THD = x_THD - x_THD.mean(-1, keepdim=True)
    if norm.kind == "l2":
        unit_THD = x_THD / x_THD.norm(dim=-1, keepdim=True).clamp_min(norm.eps) * x_THD.shape[-1] ** 0.5
    else:
        unit_THD = x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        unit_THD = unit_THD * norm.weight
    return (unit_THD if norm.bias is None else unit_THD + norm.bias).to(x_THD.dtype)


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
) -> tuple[Tensor, Tensor]:
    """softmax(scale · norm(q) · norm(k)ᵀ) · v inside each segment. Returns (out_THD, lse_HT).

    A query whose segment has no keys gets a zero row and an lse of −inf.
    """
    scale = q_THD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_THD, k_THD = head_norm(q_THD, q_norm), head_norm(k_THD, k_norm)
    starts = cu_seqlens.tolist()
    starts_k = starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [v_THD[:0]], [q_THD.new_empty(q_THD.shape[1], 0)]
    for first, last, first_k, last_k in zip(starts, starts[1:], starts_k, starts_k[1:], strict=False):
        scores_HQK = torch.einsum("qhd,khd->hqk", q_THD[first:last], k_THD[first_k:last_k]) * scale
        lse_HQ = torch.logsumexp(scores_HQK, -1)
        if first_k == last_k:
            outs.append(v_THD.new_zeros(last - first, *v_THD.shape[1:]))
        else:
            outs.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores_HQK, -1), v_THD[first_k:last_k]))
        lses.append(lse_HQ)
    lse_HT = torch.cat(lses, 1)
    return torch.cat(outs), lse_HT if lse_HT.dtype == torch.float64 else lse_HT.float()
