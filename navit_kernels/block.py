"""A transformer block on packed tokens as one op, and as one node of autograd.

    x       = x + keep_1 · scale_1 · (attention(normed · qkvᵀ + qkv_bias) · outᵀ + out_bias)
    x       = x + keep_2 · scale_2 · feed_forward(norm(x))
    result  = x, following(x)

It runs the kernels of varlen_attention, add_norm and feed_forward in that order, and backward in the reverse; it has no
kernel of its own. What it saves is the host's time: op by op, with a dispatch, a node of autograd and casts of weights
for each, the host takes longer over a block than a fast GPU does. What to launch for arguments of one kind is found out
a few times and then replayed (_replay.py). torch.compile sees one op, too.

T tokens, S images, E model width, H heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _block_passes as passes
from . import _block_reference as reference
from ._autocast import autocast_dtype
from ._block_arguments import Layers, Options, Parameters, Work, only_multiply
from ._block_passes import Gradients, Ops, Saved
from ._direct import skips_dispatcher
from .mlp import op as mlp_op
from .plan import PackPlan
from .residual_norm import op as norm_op
from .self_attention.config import SUPPORTED_HEAD_DIMS

__all__ = ["Layers", "Options", "Parameters", "block", "only_multiply"]

SAVED, WORK, PARAMETERS, OPTIONS = (len(group._fields) for group in (Saved, Work, Parameters, Options))


def block(
    x_TE: Tensor,
    normed_TE: Tensor,
    parameters: Parameters,
    options: Options,
    cu_seqlens: Tensor,
    plan: PackPlan | None,
    keep_1_S: Tensor | None = None,
    keep_2_S: Tensor | None = None,
    layers: Layers | None = None,
) -> tuple[Tensor, Tensor]:
    """From the residual stream and its norm to the stream and the norm that follows.

    x_TE, normed_TE: (T, E); normed has the dtype that matrices are multiplied in, autocast's if that is on.
    cu_seqlens, plan: as varlen_attention takes them. keep_1_S, keep_2_S: add_norm's keep_scale_S of either branch.
    layers: called in place of the products by the parameters' matrices, which are then not looked at.

    Promises what its ops promise. Arguments are trusted to fit one another. The ops run one by one on CPU tensors,
    without a plan, with layers, and with dtypes and head widths that there are no kernels for, which they refuse by
    name.
    """
    if plan is None or layers is not None or not _takes(x_TE, normed_TE, parameters, options.heads):
        return reference.block(x_TE, normed_TE, parameters, options, cu_seqlens, plan, keep_1_S, keep_2_S, layers)
    work = Work(plan.items, plan.offsets, plan.host_offsets, cu_seqlens, keep_1_S, keep_2_S)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (x_TE, normed_TE, *parameters))
    if not skips_dispatcher(x_TE):
        x_TE, normed_TE, *_ = torch.ops.navit_kernels.block(x_TE, normed_TE, *work, *parameters, *options, trained)
    elif not trained:
        x_TE, normed_TE, *_ = _run_forward(x_TE, normed_TE, work, parameters, options, False)
    else:  # Function.apply, without a look for what functorch has left, which skips_dispatcher has seen to
        apply = super(torch.autograd.Function, _Block).apply
        x_TE, normed_TE = apply(options, x_TE, normed_TE, *work, *parameters)
    return x_TE, normed_TE


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


# The kernels, one after the other


def _forward_steps(tensors: Sequence[Any], host_offsets: Any, o: Options, trained: bool) -> Sequence[Tensor | None]:
    x_TE, normed_TE, *rest = tensors
    work, p = Work(*rest[:WORK])._replace(host_offsets=host_offsets), Parameters(*rest[WORK:])
    x_TE, normed_TE, saved = passes.forward(passes.kernels(), x_TE, normed_TE, work, p, o, trained)
    return [x_TE, normed_TE, *(saved or ())]


def _backward_steps(
    tensors: Sequence[Any], host_offsets: Any, o: Options, weight_grads: bool
) -> Sequence[Tensor | None]:
    x_TE, normed_TE, d_x, d_normed, *rest = tensors
    saved, p = Saved(*rest[:SAVED]), Parameters(*rest[-PARAMETERS:])
    work = Work(*rest[SAVED:-PARAMETERS])._replace(host_offsets=host_offsets)
    g = passes.backward(passes.kernels(), d_x, d_normed, x_TE, normed_TE, saved, work, p, o, weight_grads)
    return _flat(g, p, weight_grads)


def _flat(g: Gradients, p: Parameters, weight_grads: bool) -> list[Tensor | None]:
    """Of x, normed and the parameters."""
    return [g.x, g.normed, *(passes.of_parameters(g, p) if weight_grads else [None] * PARAMETERS)]


@functools.cache
def _replayed() -> tuple[Callable[..., Sequence[Any]], Callable[..., Sequence[Any]]]:
    from ._replay import Replayed

    return Replayed(_forward_steps), Replayed(_backward_steps)


def _run(which: int, tensors: Sequence[Tensor | None], work: Work, p: Parameters, o: Options, flag: bool) -> Any:
    """Forward or backward. Where a plan's classes end decides what is launched, so that these go along as numbers."""
    ends = None if work.host_offsets is None else tuple(work.host_offsets.tolist())
    return _replayed()[which]((*tensors, *work._replace(host_offsets=None), *p), ends, o, flag)


def _run_forward(
    x_TE: Tensor, normed_TE: Tensor, work: Work, p: Parameters, o: Options, trained: bool
) -> Sequence[Any]:
    """x, normed and, if trained, Saved's."""
    return _run(0, (x_TE, normed_TE), work, p, o, trained)


def _run_backward(
    d_x: Tensor | None, d_normed: Tensor, x_TE: Tensor, normed_TE: Tensor, saved: Saved, work: Work, p: Parameters,
    o: Options, weight_grads: bool,
) -> list[Tensor | None]:  # fmt: skip
    return _run(1, (x_TE, normed_TE, d_x, d_normed, *saved), work, p, o, weight_grads)


# Autograd


def _save(
    ctx: Any, x_TE: Tensor, normed_TE: Tensor, saved: Sequence[Tensor | None], work: Work, p: Parameters, o: Options
) -> None:
    """For _gradients. x: the result; normed: the argument."""
    ctx.save_for_backward(x_TE, normed_TE, *saved, *work, *p)
    ctx.options = o
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Callable[..., list[Tensor | None]], ctx: Any, d_x: Tensor | None, d_normed: Tensor | None,
    weight_grads: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Of x, normed, Work, and Parameters, after _save."""
    x_TE, normed_TE, *rest = ctx.saved_tensors
    saved, work, p = Saved(*rest[:SAVED]), Work(*rest[SAVED:-PARAMETERS]), Parameters(*rest[-PARAMETERS:])
    if d_normed is None:
        d_normed = torch.zeros_like(normed_TE)
    d_x, d_normed, *grads = backward(d_x, d_normed, x_TE, normed_TE, saved, work, p, ctx.options, weight_grads)
    return [d_x, d_normed, *[None] * WORK, *grads]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, x_TE: Tensor, normed_TE: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        work, p = Work(*rest[:WORK]), Parameters(*rest[WORK:])
        x_new, normed_new, *saved = _run_forward(x_TE, normed_TE, work, p, o, True)
        _save(ctx, x_new, normed_TE, saved, work, p, o)
        return x_new, normed_new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(_run_backward, ctx, d_x, d_normed, any(ctx.needs_input_grad[3 + WORK :]))


# Registration: the same on flat lists of arguments, and with an empty tensor for each None among the results


def _feed_forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    out_TE, hidden_TU, *_ = mlp_op._feed_forward(*inputs)
    return out_TE, hidden_TU if inputs[-1] else None


def _add_norm_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, linear_bias = inputs
    d_x, d_branch, sums_NE = norm_op._add_norm_backward(*inputs)
    return d_x, d_branch, torch.cat([sums_NE, sums_NE[:1]] if linear_bias else [sums_NE])[None]


def _feed_forward_backward(d_mlp: Tensor, x: Tensor, hidden: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    hidden = x.new_empty(0, 0) if hidden is None else hidden
    d_x, d_up, d_down, d_up_bias, _ = mlp_op._feed_forward_backward(d_mlp, x, hidden, *rest, False)
    _, _, up_bias, _, weight_dtype = rest
    if weight_dtype is None:
        return d_x, None, None, None
    return d_x, d_up, d_down, None if up_bias is None else d_up_bias[None]


_REGISTERED = Ops(
    torch.ops.navit_kernels.varlen_attention.default, torch.ops.navit_kernels.varlen_attention_backward.default,
    norm_op._add_norm, _add_norm_backward, _feed_forward, _feed_forward_backward,
    lambda d_y, x, dtype: (d_y.T @ x).to(dtype), lambda d_y: d_y.sum(0, keepdim=True, dtype=torch.float32),
    lambda partials: [partial.sum(0) for partial in partials],
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
    x_new, normed_new, saved = passes.forward(ops(), x_TE, normed_TE, *_split(rest))
    return x_new, normed_new, *(x_TE.new_empty(0) if x is None else x for x in saved or [None] * SAVED)


def _registered_backward(
    ops: Callable[[], Ops], d_x: Tensor | None, d_normed: Tensor, x_new: Tensor, normed_TE: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    parts: list[Any] = [None if x is None or x.shape == (0,) else x for x in rest[:SAVED]]
    saved = Saved(*parts)
    gradients = passes.backward(ops(), d_x, d_normed, x_new, normed_TE, saved, *_split(rest[SAVED:]))
    return tuple(d_normed.new_empty(0) if x is None else x for x in gradients)


torch.library.impl("navit_kernels::block", "CUDA", functools.partial(_registered_forward, passes.kernels))
torch.library.impl("navit_kernels::block_backward", "CUDA", functools.partial(_registered_backward, passes.kernels))
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
        return _flat(Gradients(*torch.ops.navit_kernels.block_backward(*inputs)), p, weight_grads)

    weight_grads = any(ctx.needs_input_grad[2 + WORK : 2 + WORK + PARAMETERS])
    return *_gradients(backward, ctx, d_x, d_normed, weight_grads), *[None] * (OPTIONS + 1)


torch.library.register_autograd("navit_kernels::block", _registered_gradients, setup_context=_registered_context)
