"""The meaning of add_norm, in plain torch. T tokens, S images, E model width."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Return x + keep_scale · layer_scale · branch in x's dtype, and its norm over E in `out_dtype`.

    16-bit inputs are computed in float32; the sum is rounded to x's dtype before it is normalized.
    """
    working = torch.promote_types(x_TE.dtype, torch.float32)
    out_dtype = out_dtype or (x_TE if branch_TE is None else branch_TE).dtype
    if branch_TE is not None:
        branch_TE = branch_TE.to(working)
        if layer_scale_E is not None:
            branch_TE = branch_TE * layer_scale_E.to(working)
        if keep_scale_S is not None:
            assert cu_seqlens is not None
            keep_T = torch.repeat_interleave(keep_scale_S.to(working), cu_seqlens.diff(), output_size=len(x_TE))
            branch_TE = branch_TE * keep_T[:, None]
        x_TE = (x_TE.to(working) + branch_TE).to(x_TE.dtype)
    centred_TE = x_TE.to(working)
    if kind == "layer_norm":
        centred_TE = centred_TE - centred_TE.mean(-1, keepdim=True)
    normed_TE = centred_TE * torch.rsqrt(centred_TE.square().mean(-1, keepdim=True) + eps) * weight_E.to(working)
    if bias_E is not None:
        normed_TE = normed_TE + bias_E.to(working)
    return x_TE, normed_TE.to(out_dtype)
