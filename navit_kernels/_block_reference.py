"""The meaning of block, in public ops: what runs on a CPU, and wherever the one op does not.

T tokens, S images, E model width, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._block_arguments import Layers, Options, Parameters
from .head_norm import NORM_CODES, HeadNorm
from .mlp import feed_forward
from .plan import PackPlan
from .residual_norm import add_norm
from .self_attention import varlen_attention_qkvpacked

KINDS = {code: kind for kind, code in NORM_CODES.items()}


def block(
    x_TE: Tensor, normed_TE: Tensor, p: Parameters, o: Options, cu_seqlens: Tensor, plan: PackPlan | None,
    keep_1: Tensor | None = None, keep_2: Tensor | None = None, layers: Layers | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As block.block, on any device."""
    dtype = normed_TE.dtype

    def cast(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(dtype)

    def head_norm(code: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> HeadNorm | None:
        kind = KINDS[code]
        parts = (part if part is None or part.dim() < 3 else part.squeeze(1) for part in (weight, bias))
        return None if kind is None else HeadNorm(kind, *parts, eps)

    def norm(x, branch, weight, bias, scale, keep, centred, eps):  # type: ignore[no-untyped-def]
        return add_norm(
            x, branch, weight, bias, layer_scale_E=scale, keep_scale_S=keep, cu_seqlens=cu_seqlens, eps=eps,
            kind="layer_norm" if centred else "rms_norm",
        )  # fmt: skip

    def project(x_TE: Tensor) -> Tensor:
        parts = [cast(part) for part in (p.qkv, p.qkv_2, p.qkv_3) if part is not None]
        return linear(x_TE, parts[0] if len(parts) == 1 else torch.cat(parts), cast(p.qkv_bias))

    def leave(out_TI: Tensor) -> Tensor:
        return linear(out_TI, cast(p.out), cast(p.out_bias))

    def mlp(x_TE: Tensor) -> Tensor:
        weights = (cast(weight) for weight in (p.up, p.down, p.up_bias, p.down_bias))
        return feed_forward(x_TE, *weights, activation=o.activation, recompute=o.recompute)

    layers = layers or Layers(project, leave, mlp)
    qkv_T3HD = layers.qkv(normed_TE).unflatten(1, (3, o.heads, -1))
    out_THD = varlen_attention_qkvpacked(
        qkv_T3HD, cu_seqlens, q_norm=head_norm(o.q_kind, p.q_weight, p.q_bias, o.q_eps),
        k_norm=head_norm(o.k_kind, p.k_weight, p.k_bias, o.k_eps), softmax_scale=o.softmax_scale, plan=plan,
    )  # fmt: skip
    branch_TE = layers.out(out_THD.flatten(1))
    x_TE, normed_TE = norm(x_TE, branch_TE, p.norm_weight, p.norm_bias, p.scale_1, keep_1, o.norm_centred, o.norm_eps)
    del qkv_T3HD, out_THD, branch_TE  # what no gradient needs makes room for the MLP
    return norm(
        x_TE, layers.mlp(normed_TE), p.following_weight, p.following_bias, p.scale_2, keep_2, o.following_centred,
        o.following_eps,
    )  # fmt: skip
