"""What navit_kernels.block computes, of the public ops."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from navit_kernels import HeadNorm, PackPlan, add_norm, feed_forward, varlen_attention_qkvpacked
from navit_kernels.block import Options, Parameters
from navit_kernels.head_norm import NORM_CODES


def by_ops(
    x_TE: Tensor, normed_TE: Tensor, p: Parameters, o: Options, plan: PackPlan, keep_1: Tensor | None = None,
    keep_2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `block`, on any device."""
    dtype, kinds = normed_TE.dtype, {code: kind for kind, code in NORM_CODES.items()}

    def cast(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(dtype)

    def of_heads(weight: Tensor | None) -> Tensor | None:
        return weight if weight is None or weight.dim() < 3 else weight.squeeze(1)

    norms: dict[str, Any] = {}
    for name, weight, bias, code, eps in (
        ("q_norm", p.q_weight, p.q_bias, o.q_kind, o.q_eps), ("k_norm", p.k_weight, p.k_bias, o.k_kind, o.k_eps),
    ):  # fmt: skip
        kind = kinds[code]
        norms[name] = None if kind is None else HeadNorm(kind, of_heads(weight), of_heads(bias), eps)
    qkv = torch.cat([cast(part) for part in (p.qkv, p.qkv_2, p.qkv_3) if part is not None])
    qkv_T3HD = linear(normed_TE, qkv, cast(p.qkv_bias)).unflatten(1, (3, o.heads, -1))
    out_THD = varlen_attention_qkvpacked(qkv_T3HD, plan.cu_seqlens, softmax_scale=o.softmax_scale, plan=plan, **norms)
    branch_TE = linear(out_THD.flatten(1), cast(p.out), cast(p.out_bias))

    def norm(x, branch, weight, bias, scale, keep, centred, eps):  # type: ignore[no-untyped-def]
        return add_norm(
            x, branch, weight, bias, layer_scale_E=scale, keep_scale_S=keep, cu_seqlens=plan.cu_seqlens, eps=eps,
            kind="layer_norm" if centred else "rms_norm",
        )  # fmt: skip

    x_TE, normed_TE = norm(x_TE, branch_TE, p.norm_weight, p.norm_bias, p.scale_1, keep_1, o.norm_centred, o.norm_eps)
    biases = cast(p.up_bias), cast(p.down_bias)
    branch_TE = feed_forward(normed_TE, cast(p.up), cast(p.down), *biases, activation=o.activation)
    return norm(
        x_TE, branch_TE, p.following_weight, p.following_bias, p.scale_2, keep_2, o.following_centred, o.following_eps
    )
