"""Reference: pooling inside each segment. Plain torch, a loop over segments.

T tokens, S segments (images), Q learned queries, H heads, D head width, E model width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..head_norm import HeadNorm
from ..self_attention.reference import varlen_attention


def pool_tokens(x_TE: Tensor, cu_seqlens: Tensor, mode: str = "mean") -> Tensor:
    """Return (S, E): mean or maximum over each segment's tokens, or its first token; zeros where there are none.

    The gradient of a maximum goes to the first token that attains it.
    """
    starts = cu_seqlens.tolist()
    rows = [x_TE.new_zeros(0, x_TE.shape[1])]
    for first, last in pairwise(starts):
        if first == last:
            pooled_E = x_TE.new_zeros(x_TE.shape[1])
        elif mode == "mean":
            pooled_E = x_TE[first:last].mean(0)
        elif mode == "max":
            pooled_E = x_TE[first:last].max(0).values
        else:
            pooled_E = x_TE[first]
        rows.append(pooled_E[None])
    return torch.cat(rows)


def attention_pool(
    query_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    *,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Return (S, Q, H, D): varlen_attention with the same queries for every segment; zeros where there are no keys."""
    queries, segments = len(query_QHD), len(cu_seqlens) - 1
    q_THD = query_QHD.repeat(segments, 1, 1)
    cu_queries = torch.arange(segments + 1) * queries
    out_THD, _ = varlen_attention(
        q_THD, k_THD, v_THD, cu_queries, cu_seqlens, q_norm=q_norm, k_norm=k_norm, softmax_scale=softmax_scale
    )
    return out_THD.view(segments, queries, *out_THD.shape[1:])
