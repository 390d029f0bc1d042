"""A block's forward and backward by the kernels of its ops.

T tokens, S images, E model width, H heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._block_arguments import Options, Parameters, Work
from .self_attention import op as attention_op


class Ops(NamedTuple):
    """What a block is made of: kernels called directly, or the same as torch's ops."""

    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    add_norm: Callable[..., Any]
    add_norm_backward: Callable[..., Any]
    feed_forward: Callable[..., Any]
    feed_forward_backward: Callable[..., Any]
    weight_gradient: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    partial_sums: Callable[[Tensor], Tensor]
    sum_rows: Callable[[Sequence[Tensor]], Sequence[Tensor]]


@functools.cache
def kernels() -> Ops:
    from ._column_sums import partial_sums, sum_rows
    from .mlp import kernel as mlp
    from .residual_norm import kernel as norm

    return Ops(
        attention_op._forward, attention_op._backward_kernels, norm.add_norm, norm.add_norm_backward, mlp.feed_forward,
        mlp.feed_forward_backward, mlp.weight_gradient, partial_sums, sum_rows,
    )  # fmt: skip


class Weights(NamedTuple):
    """Of the products, in their dtype."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


class Saved(NamedTuple):
    """What the forward leaves for the backward, beside its inputs and results: branches where they have a scale, and
    weights where they were cast."""

    qkv: Tensor
    out: Tensor
    lse: Tensor
    r: Tensor | None
    branch_1: Tensor | None
    x_mid: Tensor
    stats_1: Tensor
    normed_mid: Tensor
    hidden: Tensor | None
    branch_2: Tensor | None
    stats_2: Tensor
    qkv_weight: Tensor | None
    out_weight: Tensor | None
    up_weight: Tensor | None
    down_weight: Tensor | None
    up_bias: Tensor | None


class Gradients(NamedTuple):
    """Matrices' in the parameters' dtype; all others' of parameters in float32. norm, following: (1 to 4, E), of the
    norm's weight and, where there are these, its bias, the branch's scale and the bias of the linear layer that the
    branch comes from. heads: (H, 3, D), as attention's backward gives it for the norms of q and k."""

    x: Tensor
    normed: Tensor
    qkv: Tensor | None
    out: Tensor | None
    up: Tensor | None
    down: Tensor | None
    qkv_bias: Tensor | None
    up_bias: Tensor | None
    norm: Tensor | None
    following: Tensor | None
    heads: Tensor | None


def _weights(p: Parameters, dtype: torch.dtype) -> tuple[Weights, bool]:
    """All weights, cast by one launch, or as they are given; and whether they were cast."""
    given = Weights(p.qkv, p.out, p.up, p.down, p.qkv_bias, p.out_bias, p.up_bias, p.down_bias)
    if p.qkv_2 is None and all(x is None or x.dtype == dtype for x in given):
        return given, False
    parts = [part for part in (p.qkv, p.qkv_2, p.qkv_3) if part is not None]
    rows = [part.shape[0] for part in parts]
    qkv = p.qkv.new_empty(sum(rows), p.qkv.shape[1], dtype=dtype)
    others = [None if x is None else torch.empty_like(x, dtype=dtype) for x in given[1:]]
    to, of = [*qkv.split(rows)], parts
    for x, like in zip(others, given[1:], strict=True):
        if x is not None and like is not None:
            to.append(x)
            of.append(like)
    torch._foreach_copy_(to, of)
    return Weights(qkv, *others), True  # type: ignore[arg-type]


def _heads(p: Parameters, o: Options) -> tuple[Any, ...]:
    """The norms of q and k, and the scale, as attention takes them."""
    weights = (p.q_weight, p.q_bias, p.k_weight, p.k_bias)
    parts = [part if part is None or part.dim() < 3 else part.squeeze(1) for part in weights]
    return *parts, o.q_kind, o.q_eps, o.k_kind, o.k_eps, o.softmax_scale


def forward(
    ops: Ops, x_TE: Tensor, normed_TE: Tensor, work: Work, p: Parameters, o: Options, trained: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """x, normed, and Saved, if there will be a backward."""
    dtype = normed_TE.dtype
    w, cast = _weights(p, dtype)
    qkv = linear(normed_TE, w.qkv, w.qkv_bias).view(x_TE.shape[0], 3, o.heads, w.out.shape[1] // o.heads)
    out, lse, r = ops.attention(qkv, None, None, *work[:3], *_heads(p, o), False, trained)
    branch = linear(out.flatten(1), w.out, w.out_bias)
    x_mid, normed_mid, stats_1 = ops.add_norm(
        x_TE, branch, p.norm_weight, p.norm_bias, p.scale_1, work.keep_1, work.cu_seqlens, o.norm_centred, o.norm_eps,
        dtype,
    )  # fmt: skip
    attended = (qkv, out, lse, r, branch if p.scale_1 is not None else None) if trained else None
    del qkv, out, lse, r, branch  # what no backward needs makes room for the MLP
    keep_hidden = trained and not o.recompute
    mlp, hidden, *_ = ops.feed_forward(normed_mid, w.up, w.down, w.up_bias, w.down_bias, o.activation, keep_hidden)
    x_new, normed_new, stats_2 = ops.add_norm(
        x_mid, mlp, p.following_weight, p.following_bias, p.scale_2, work.keep_2, work.cu_seqlens, o.following_centred,
        o.following_eps, dtype,
    )  # fmt: skip
    if attended is None:
        return x_new, normed_new, None
    kept = (w.qkv, w.out, w.up, w.down, w.up_bias) if cast else (None, None, None, None, None)
    branch_2 = None if p.scale_2 is None else mlp
    return x_new, normed_new, Saved(*attended, x_mid, stats_1, normed_mid, hidden, branch_2, stats_2, *kept)


def backward(
    ops: Ops, d_x: Tensor | None, d_normed: Tensor, x_TE: Tensor, normed_before: Tensor, s: Saved, work: Work,
    p: Parameters, o: Options, weight_grads: bool,
) -> Gradients:  # fmt: skip
    """x_TE: the forward's result. weight_grads: whether parameters get gradients."""
    dtype = normed_before.dtype
    weights: tuple[Any, ...] = p[:4] if s.qkv_weight is None else s[-5:-1]
    qkv_weight, out_weight, up_weight, down_weight = weights
    up_bias = p.up_bias if s.up_bias is None else s.up_bias
    scaled = [scale is not None or keep is not None or dtype != x_TE.dtype
              for scale, keep in ((p.scale_1, work.keep_1), (p.scale_2, work.keep_2))]  # fmt: skip
    d_x, d_mlp, d_following = ops.add_norm_backward(
        d_x, d_normed, x_TE, s.stats_2, s.branch_2, p.following_weight, p.scale_2, o.following_centred,
        p.following_bias is not None, dtype if scaled[1] else None, weight_grads and p.down_bias is not None,
    )  # fmt: skip
    d_mlp = d_mlp if scaled[1] else d_x
    d_normed, d_up, d_down, d_up_bias = ops.feed_forward_backward(
        d_mlp, s.normed_mid, s.hidden, up_weight, down_weight, up_bias, o.activation,
        p.qkv.dtype if weight_grads else None,
    )  # fmt: skip
    d_x, d_branch, d_norm = ops.add_norm_backward(
        d_x, d_normed, s.x_mid, s.stats_1, s.branch_1, p.norm_weight, p.scale_1, o.norm_centred,
        p.norm_bias is not None, dtype if scaled[0] else None, weight_grads and p.out_bias is not None,
    )  # fmt: skip
    d_branch = d_branch if scaled[0] else d_x
    normed_heads = weight_grads and not (p.q_weight is None and p.q_bias is None and p.k_weight is None)
    d_out_THD = (d_branch @ out_weight).view(s.out.shape)
    d_qkv, _, _, d_heads = ops.attention_backward(
        d_out_THD, s.out, s.lse, s.r, s.qkv, None, None, *work[:3], *_heads(p, o), False, normed_heads
    )
    d_qkv = d_qkv.flatten(1)
    d_normed = d_qkv @ qkv_weight
    if not weight_grads:
        return Gradients(d_x, d_normed, *[None] * 9)
    d_qkv_weight = ops.weight_gradient(d_qkv, normed_before, p.qkv.dtype)
    d_out_weight = ops.weight_gradient(d_branch, s.out.flatten(1), p.qkv.dtype)
    d_qkv_bias = None if p.qkv_bias is None else ops.partial_sums(d_qkv)
    parts = (d_qkv_bias, d_up_bias, d_norm, d_following)
    sums = iter(ops.sum_rows([part for part in parts if part is not None]))
    summed = [None if part is None else next(sums) for part in parts]
    return Gradients(
        d_x, d_normed, d_qkv_weight, d_out_weight, d_up, d_down, *summed, d_heads if normed_heads else None
    )


def of_parameters(g: Gradients, p: Parameters) -> list[Tensor | None]:
    """The gradient of each parameter, in their order."""
    assert g.qkv is not None
    rows = [part.shape[0] for part in (p.qkv, p.qkv_2, p.qkv_3) if part is not None]
    qkv, qkv_2, qkv_3 = (*(g.qkv.split(rows) if len(rows) > 1 else (g.qkv,)), None, None)[:3]
    norm_weight, norm_bias, scale_1, out_bias = _rows(g.norm, p.norm_bias, p.scale_1, p.out_bias)
    following_weight, following_bias, scale_2, down_bias = _rows(g.following, p.following_bias, p.scale_2, p.down_bias)
    heads: list[Tensor | None] = [None] * 3
    for i, weight in enumerate((p.q_weight, p.q_bias, p.k_weight)):
        if weight is not None and g.heads is not None:
            grad_HD = g.heads[:, i]
            heads[i] = grad_HD.sum(0) if weight.dim() == 1 else grad_HD.view(weight.shape)
    grads = [
        qkv, g.out, g.up, g.down, norm_weight, following_weight, qkv_2, qkv_3, g.qkv_bias, out_bias, g.up_bias,
        down_bias, *heads, None if p.k_bias is None else torch.zeros_like(p.k_bias), norm_bias, following_bias, scale_1,
        scale_2,
    ]  # fmt: skip
    return [
        None if x is None or grad is None else grad if grad.dtype == x.dtype else grad.to(x.dtype)
        for x, grad in zip(p, grads, strict=True)
    ]


def _rows(sums_NE: Tensor | None, *parameters: Tensor | None) -> list[Tensor | None]:
    """The first row, and one for each parameter that there is."""
    assert sums_NE is not None
    first, *rest = sums_NE.unbind(0)
    rows = iter(rest)
    return [first, *(None if parameter is None else next(rows) for parameter in parameters)]
