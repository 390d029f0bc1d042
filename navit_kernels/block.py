"""A transformer block on packed tokens as one op, and as one node of autograd.

    x       = x + keep_1 · scale_1 · (attention(normed · qkvᵀ + qkv_bias) · outᵀ + out_bias)
    x       = x + keep_2 · scale_2 · feed_forward(norm(x))
    result  = x, following(x)

It runs the kernels of varlen_attention, add_norm and feed_forward in that order, and backward in the reverse; it has no
kernel of its own. What it saves is the host's time: op by op, with a dispatch, a node of autograd and casts of weights
for each, the host takes longer over a block than a fast GPU does. torch.compile sees one op, too.

T tokens, S images, E model width, H heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ._autocast import autocast_dtype
from ._block_by_ops import by_ops
from ._direct import skips_dispatcher
from .head_norm import NORM_CODES
from .mlp import op as mlp_op
from .plan import PackPlan
from .residual_norm import op as norm_op
from .self_attention import op as attention_op
from .self_attention.config import SUPPORTED_HEAD_DIMS


class Parameters(NamedTuple):
    """Of a block and of the norm that follows it, by their names above; None where there is none of that name.

    qkv: (3HD, E), rows for q, then for k, then for v; or the same in two or three parts, qkv, qkv_2 and qkv_3.
    out, up, down, biases: as feed_forward takes them, nn.Linear's layout. All are brought to normed's dtype.
    q_weight and so on: of the norms of q and k: (D,), (H, D) or (H, 1, D).
    """

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    norm_weight: Tensor
    following_weight: Tensor
    qkv_2: Tensor | None = None
    qkv_3: Tensor | None = None
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    norm_bias: Tensor | None = None
    following_bias: Tensor | None = None
    scale_1: Tensor | None = None
    scale_2: Tensor | None = None


class Options(NamedTuple):
    """Of a block. Kinds are NORM_CODES of the norms of q and k; centred: of the stream's, layer norm or RMS norm;
    recompute: as feed_forward takes it."""

    heads: int
    softmax_scale: float
    activation: str
    q_kind: int = NORM_CODES[None]
    q_eps: float = 1e-6
    k_kind: int = NORM_CODES[None]
    k_eps: float = 1e-6
    norm_centred: bool = True
    norm_eps: float = 1e-6
    following_centred: bool = True
    following_eps: float = 1e-6
    recompute: bool = False


class Work(NamedTuple):
    """A plan's lists; and per image how much of either branch is kept, or None for all."""

    items: Tensor
    offsets: Tensor
    host_offsets: Tensor | None
    cu_seqlens: Tensor
    keep_1: Tensor | None
    keep_2: Tensor | None


def block(
    x_TE: Tensor,
    normed_TE: Tensor,
    parameters: Parameters,
    options: Options,
    cu_seqlens: Tensor,
    plan: PackPlan | None,
    keep_1_S: Tensor | None = None,
    keep_2_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the residual stream and its norm to the stream and the norm that follows.

    x_TE, normed_TE: (T, E); normed has the dtype that matrices are multiplied in, autocast's if that is on.
    cu_seqlens, plan: as varlen_attention takes them. keep_1_S, keep_2_S: add_norm's keep_scale_S of either branch.

    Promises what its ops promise. Arguments are trusted to fit one another. The ops run one by one on CPU tensors,
    without a plan, and with dtypes and head widths that there are no kernels for, which they refuse by name.
    """
    if plan is None or not _takes(x_TE, normed_TE, parameters, options.heads):
        return by_ops(x_TE, normed_TE, parameters, options, cu_seqlens, plan, keep_1_S, keep_2_S)
    work = Work(plan.items, plan.offsets, plan.host_offsets, cu_seqlens, keep_1_S, keep_2_S)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (x_TE, normed_TE, *parameters))
    if not skips_dispatcher(x_TE):
        x_TE, normed_TE, *_ = torch.ops.navit_kernels.block(x_TE, normed_TE, *work, *parameters, *options, trained)
    elif not trained:
        x_TE, normed_TE, _ = _forward(_kernels(), x_TE, normed_TE, work, parameters, options, False)
    else:  # Function.apply, without a look for what functorch has left, which skips_dispatcher has seen to
        apply = super(torch.autograd.Function, _Block).apply
        x_TE, normed_TE = apply(options, x_TE, normed_TE, *work, *parameters)
    return x_TE, normed_TE


def only_multiply(*layers: nn.Module) -> bool:
    """Whether a block may take layers' weights without calling them: each is nn.Linear itself, and without hooks."""
    return all(
        type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )


def _takes(x_TE: Tensor, normed_TE: Tensor, parameters: Parameters, heads: int) -> bool:
    """Whether there are kernels for these: on a GPU, of dtypes and a head width that they have."""
    matrices = parameters[:4]
    return (
        x_TE.device.type != "cpu"
        and x_TE.dtype in norm_op.DTYPES
        and normed_TE.dtype in norm_op.DTYPES
        and autocast_dtype(x_TE.device) in (None, normed_TE.dtype)
        and all(matrix.dtype == matrices[0].dtype for matrix in matrices)
        and parameters.out.shape[1] // heads in SUPPORTED_HEAD_DIMS
    )


# Forward and backward


class Ops(NamedTuple):
    """What a block is made of: kernels called directly, or the same as torch's ops."""

    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    add_norm: Callable[..., Any]
    add_norm_backward: Callable[..., Any]
    feed_forward: Callable[..., Any]
    feed_forward_backward: Callable[..., Any]
    weight_gradient: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    bias_gradient: Callable[[Tensor], Tensor]


@functools.cache
def _kernels() -> Ops:
    from ._column_sums import column_sums
    from .mlp import kernel as mlp
    from .residual_norm import kernel as norm

    return Ops(
        attention_op._forward, attention_op._backward_kernels, norm.add_norm, norm.add_norm_backward, mlp.feed_forward,
        mlp.feed_forward_backward, mlp.weight_gradient, column_sums,
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
    """Matrices' in the parameters' dtype; all others' of parameters in float32. norm, following: (1 to 3, E), as
    add_norm's backward gives them, the scale's last. heads: (H, 3, D), as attention's does for the norms of q and k."""

    x: Tensor
    normed: Tensor
    qkv: Tensor | None
    out: Tensor | None
    up: Tensor | None
    down: Tensor | None
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    norm: Tensor
    following: Tensor
    heads: Tensor | None


SAVED, WORK, PARAMETERS, OPTIONS = (len(group._fields) for group in (Saved, Work, Parameters, Options))


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


def _forward(
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


def _backward(
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
        p.following_bias is not None, dtype if scaled[1] else None,
    )  # fmt: skip
    d_mlp = d_mlp if scaled[1] else d_x
    d_normed, d_up, d_down, d_up_bias = ops.feed_forward_backward(
        d_mlp, s.normed_mid, s.hidden, up_weight, down_weight, up_bias, o.activation,
        p.qkv.dtype if weight_grads else None,
    )  # fmt: skip
    d_x, d_branch, d_norm = ops.add_norm_backward(
        d_x, d_normed, s.x_mid, s.stats_1, s.branch_1, p.norm_weight, p.scale_1, o.norm_centred,
        p.norm_bias is not None, dtype if scaled[0] else None,
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
        nothing = (None, None, None, None)
        return Gradients(d_x, d_normed, *nothing, *nothing, d_norm, d_following, None)
    d_qkv_weight = ops.weight_gradient(d_qkv, normed_before, p.qkv.dtype)
    d_out_weight = ops.weight_gradient(d_branch, s.out.flatten(1), p.qkv.dtype)
    d_qkv_bias, d_out_bias, d_down_bias = (
        None if bias is None else ops.bias_gradient(grad)
        for bias, grad in ((p.qkv_bias, d_qkv), (p.out_bias, d_branch), (p.down_bias, d_mlp))
    )
    return Gradients(
        d_x, d_normed, d_qkv_weight, d_out_weight, d_up, d_down, d_qkv_bias, d_out_bias, d_up_bias, d_down_bias, d_norm,
        d_following, d_heads if normed_heads else None,
    )  # fmt: skip


def _of_parameters(g: Gradients, p: Parameters) -> list[Tensor | None]:
    """The gradient of each parameter, in their order."""
    assert g.qkv is not None
    rows = [part.shape[0] for part in (p.qkv, p.qkv_2, p.qkv_3) if part is not None]
    qkv, qkv_2, qkv_3 = (*(g.qkv.split(rows) if len(rows) > 1 else (g.qkv,)), None, None)[:3]
    norm, following = g.norm.unbind(0), g.following.unbind(0)
    heads: list[Tensor | None] = [None] * 3
    for i, weight in enumerate((p.q_weight, p.q_bias, p.k_weight)):
        if weight is not None and g.heads is not None:
            grad_HD = g.heads[:, i]
            heads[i] = grad_HD.sum(0) if weight.dim() == 1 else grad_HD.view(weight.shape)
    grads = [
        qkv, g.out, g.up, g.down, norm[0], following[0], qkv_2, qkv_3, g.qkv_bias, g.out_bias, g.up_bias, g.down_bias,
        *heads, None if p.k_bias is None else torch.zeros_like(p.k_bias), norm[min(1, len(norm) - 1)],
        following[min(1, len(following) - 1)], norm[-1], following[-1],
    ]  # fmt: skip
    return [
        None if x is None or grad is None else grad if grad.dtype == x.dtype else grad.to(x.dtype)
        for x, grad in zip(p, grads, strict=True)
    ]


def _save(
    ctx: Any, x_TE: Tensor, normed_TE: Tensor, saved: Sequence[Tensor | None], work: Work, p: Parameters, o: Options
) -> None:
    """For _gradients. x: the result; normed: the argument."""
    ctx.save_for_backward(x_TE, normed_TE, *saved, *work, *p)
    ctx.options = o
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Callable[..., Gradients], ctx: Any, d_x: Tensor | None, d_normed: Tensor | None, weight_grads: bool
) -> list[Tensor | None]:
    """Of x, normed, Work, and Parameters, after _save."""
    x_TE, normed_TE, *rest = ctx.saved_tensors
    saved, work, p = Saved(*rest[:SAVED]), Work(*rest[SAVED:-PARAMETERS]), Parameters(*rest[-PARAMETERS:])
    if d_normed is None:
        d_normed = torch.zeros_like(normed_TE)
    g = backward(d_x, d_normed, x_TE, normed_TE, saved, work, p, ctx.options, weight_grads)
    return [g.x, g.normed, *[None] * WORK, *(_of_parameters(g, p) if weight_grads else [None] * PARAMETERS)]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, x_TE: Tensor, normed_TE: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        work, p = Work(*rest[:WORK]), Parameters(*rest[WORK:])
        x_new, normed_new, saved = _forward(_kernels(), x_TE, normed_TE, work, p, o, True)
        assert saved is not None
        _save(ctx, x_new, normed_TE, saved, work, p, o)
        return x_new, normed_new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = functools.partial(_backward, _kernels())
        return None, *_gradients(backward, ctx, d_x, d_normed, any(ctx.needs_input_grad[3 + WORK :]))


# Registration: the same on flat lists of arguments, and with an empty tensor for each None among the results


def _feed_forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    out_TE, hidden_TU, *_ = mlp_op._feed_forward(*inputs)
    return out_TE, hidden_TU if inputs[-1] else None


def _feed_forward_backward(d_mlp: Tensor, x: Tensor, hidden: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    hidden = x.new_empty(0, 0) if hidden is None else hidden
    d_x, d_up, d_down, d_up_bias, _ = mlp_op._feed_forward_backward(d_mlp, x, hidden, *rest, False)
    _, _, up_bias, _, weight_dtype = rest
    if weight_dtype is None:
        return d_x, None, None, None
    return d_x, d_up, d_down, None if up_bias is None else d_up_bias


_REGISTERED = Ops(
    torch.ops.navit_kernels.varlen_attention.default, torch.ops.navit_kernels.varlen_attention_backward.default,
    norm_op._add_norm, norm_op._add_norm_backward, _feed_forward, _feed_forward_backward,
    lambda d_y, x, dtype: (d_y.T @ x).to(dtype), lambda d_y: d_y.sum(0, dtype=torch.float32),
)  # fmt: skip
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}


def _arguments(*groups: type, prefix: str = "") -> str:
    hints = [hint for group in groups for hint in get_type_hints(group).items()]
    return ", ".join(f"{_SCHEMA_TYPES[hint]} {prefix}{name}" for name, hint in hints)


_SHARED = _arguments(Work, Parameters, Options)
torch.library.define(
    "navit_kernels::block",
    f"(Tensor x, Tensor normed, {_SHARED}, bool trained) -> ({', '.join(['Tensor'] * (2 + SAVED))})",
)
torch.library.define(
    "navit_kernels::block_backward",
    f"(Tensor? d_x, Tensor d_normed, Tensor x_new, Tensor normed_before, {_arguments(Saved, prefix='saved_')}, "
    f"{_SHARED}, bool weight_grads) -> ({', '.join(['Tensor'] * len(Gradients._fields))})",
)


def _split(rest: Sequence[Any]) -> tuple[Work, Parameters, Options, bool]:
    last = WORK + PARAMETERS
    return Work(*rest[:WORK]), Parameters(*rest[WORK:last]), Options(*rest[last:-1]), rest[-1]


def _registered_forward(ops: Callable[[], Ops], x_TE: Tensor, normed_TE: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x_new, normed_new, saved = _forward(ops(), x_TE, normed_TE, *_split(rest))
    return x_new, normed_new, *(x_TE.new_empty(0) if x is None else x for x in saved or [None] * SAVED)


def _registered_backward(
    ops: Callable[[], Ops], d_x: Tensor | None, d_normed: Tensor, x_new: Tensor, normed_TE: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    saved = Saved(*(None if x is None or x.shape == (0,) else x for x in rest[:SAVED]))
    gradients = _backward(ops(), d_x, d_normed, x_new, normed_TE, saved, *_split(rest[SAVED:]))
    return tuple(d_normed.new_empty(0) if x is None else x for x in gradients)


torch.library.impl("navit_kernels::block", "CUDA", functools.partial(_registered_forward, _kernels))
torch.library.impl("navit_kernels::block_backward", "CUDA", functools.partial(_registered_backward, _kernels))
torch.library.register_fake("navit_kernels::block", functools.partial(_registered_forward, lambda: _REGISTERED))
torch.library.register_fake(
    "navit_kernels::block_backward", functools.partial(_registered_backward, lambda: _REGISTERED)
)


def _registered_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _, normed_TE, *rest = inputs
    _save(ctx, output[0], normed_TE, output[2:], *_split(rest)[:3])


def _registered_gradients(ctx: Any, d_x: Tensor | None, d_normed: Tensor | None, *_: None) -> tuple[Any, ...]:
    def backward(d_x, d_normed, x_new, normed_TE, saved, work, p, o, weight_grads):  # type: ignore[no-untyped-def]
        inputs = (d_x, d_normed, x_new, normed_TE, *saved, *work, *p, *o, weight_grads)
        return Gradients(*torch.ops.navit_kernels.block_backward(*inputs))

    weight_grads = any(ctx.needs_input_grad[2 + WORK : 2 + WORK + PARAMETERS])
    return *_gradients(backward, ctx, d_x, d_normed, weight_grads), *[None] * (OPTIONS + 1)


torch.library.register_autograd("navit_kernels::block", _registered_gradients, setup_context=_registered_context)
