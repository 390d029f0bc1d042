"""varlen_attention: checks, registration, autograd. T tokens, H heads, D head width, S segments (images)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autocast import autocast_dtype
from .._checks import check_shape
from .._direct import skips_dispatcher
from ..head_norm import HeadNorm
from ..plan import CLASSES, ITEM_FIELDS, PackPlan, max_items
from . import arguments, reference
from .arguments import launchers

if TYPE_CHECKING:
    from .launch import Launcher, Signature


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
    """softmax(softmax_scale · q_norm(q) · k_norm(k)ᵀ) · v inside each segment, without padding or a mask.

    q_THD, k_THD, v_THD: (T, H, D) of one dtype, bfloat16, float16 or float32 (true float32, no TF32); on a GPU, D is a
        multiple of 8 from 16 to 128. Any strides over T and H, so that views of one (T, 3, H, D) tensor are read in
        place; autograd then copies their three gradients into one, which `varlen_attention_qkvpacked` avoids.
    cu_seqlens: (S + 1,) int32: segment s owns the tokens cu_seqlens[s] : cu_seqlens[s + 1]; starts at 0, never
        decreases, ends at T. Segments of length 0 are legal.
    cu_seqlens_k: the same for k and v where their lengths differ (cross attention); a query of a segment without keys
        gets zeros.
    q_norm, k_norm: HeadNorm or None. Gradients flow to weights and biases. A bias of k_norm changes no output, and its
        gradient is exactly zero.
    softmax_scale: D ** -0.5 by default.
    rope: reserved.
    plan: `plan_pack` of the same lengths, made once per pack and shared by all layers. Without it each call plans on
        the device. The output and the gradients of q, k and v are the same, bit for bit; those of the norms' parameters
        are summed in another order.
    return_lse: also return the log-sum-exp of the scores, float32 (H, T), −inf without keys; not differentiable.
    backend: "auto" runs the reference on CPU tensors and the kernels on a GPU; "reference" and "triton" insist.
        "fa3" and "fa4" normalize q and k in one pass and call an installed flash-attn, for bfloat16 and float16. That
        path waits for the device unless a plan with host offsets is given, breaks a compiled graph, promises neither
        bitwise repeatability nor independence of the rest of the pack, and saves normalized q and k for the backward.

    Returns out_THD, or (out_THD, lse_HT). The kernels promise, forward and backward: the same bits for the same
    inputs; the same bits for a segment whatever else is in the pack and wherever it stands; nothing from other
    segments, NaN and inf included. No call waits for the device: values of cu_seqlens, and that a plan's are the same,
    are checked on CPU tensors only (`navit_kernels._checks.check_cu_seqlens_values` checks the former anywhere, on
    request). On a GPU wrong values, or a plan of other lengths, give wrong numbers, never a wrong address; a plan of
    another number of tokens is refused where its numbers are on the host.

    Raises ValueError naming the argument, what was expected and what came; ImportError for a flash-attn that is not
    installed.
    """
    if rope is not None:
        raise NotImplementedError("rope is reserved and must be None")
    arguments.check_inputs(q_THD, k_THD, v_THD, cu_seqlens_k is not None)
    q_THD, k_THD, v_THD = _autocast(q_THD, k_THD, v_THD)
    scale = q_THD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    signature = arguments.check_call(
        (q_THD, k_THD, v_THD), cu_seqlens, cu_seqlens_k, q_norm, k_norm, plan, backend, scale
    )
    if backend in ("fa3", "fa4"):
        from . import flash

        return flash.attention(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm, k_norm, scale, plan, return_lse, backend
        )
    if signature is None and arguments.takes_reference(backend, q_THD):
        out_THD, lse_HT = reference.varlen_attention(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm=q_norm, k_norm=k_norm, softmax_scale=scale
        )
        return (out_THD, lse_HT.detach()) if return_lse else out_THD
    out_THD, lse_or_none = _run(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm, k_norm, scale, plan, return_lse, signature
    )
    if not return_lse:
        return out_THD
    assert lse_or_none is not None
    return out_THD, _natural_lse(lse_or_none, q_THD, q_norm, k_norm, scale).detach()


def varlen_attention_qkvpacked(
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    *,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    softmax_scale: float | None = None,
    plan: PackPlan | None = None,
    backend: str = "auto",
) -> Tensor:
    """varlen_attention of q, k, v = qkv_T3HD.unbind(1), whose gradient is written as one (T, 3, H, D) tensor, uncopied.

    qkv_T3HD: (T, 3, H, D); the last two axes contiguous on a GPU. All else as in `varlen_attention`.
    """
    check_shape("qkv", qkv_T3HD, (None, 3, None, None), "(T, 3, H, D)")
    if backend in ("fa3", "fa4") or arguments.takes_reference(backend, qkv_T3HD):
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
        out = varlen_attention(
            q_THD, k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, softmax_scale=softmax_scale, plan=plan,
            backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    (qkv_T3HD,) = _autocast(qkv_T3HD)
    scale = qkv_T3HD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    signature = arguments.check_call((qkv_T3HD,), cu_seqlens, None, q_norm, k_norm, plan, backend, scale)
    return _run(qkv_T3HD, None, None, cu_seqlens, None, q_norm, k_norm, scale, plan, False, signature)[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def _run(
    q: Tensor, k: Tensor | None, v: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    q_norm: HeadNorm | None, k_norm: HeadNorm | None, scale: float, plan: PackPlan | None, keep_lse: bool,
    signature: Signature | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The kernels. k and v are None where q is the packed (T, 3, H, D)."""
    direct = signature is not None or skips_dispatcher(q)
    if plan is None:
        make = _plan if direct else torch.ops.navit_kernels.plan
        items, offsets = make(cu_seqlens, cu_seqlens_k, q.shape[0], q.shape[0] if k is None else k.shape[0])
        host_offsets = None
    else:
        items, offsets, host_offsets = plan.items, plan.offsets, plan.host_offsets
    q_kind, q_weight, q_bias, q_eps, k_kind, k_weight, k_eps = arguments.norm_fields(q_norm, k_norm)
    k_bias = None if k_norm is None else k_norm.bias
    weights = [None if x is None else x.contiguous() for x in (q_weight, q_bias, k_weight, k_bias)]
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *weights))
    lists = (items, offsets, host_offsets)
    numbers = (q_kind, q_eps, k_kind, k_eps, scale, cu_seqlens_k is not None)
    shared: tuple[Any, ...] = (q, k, v, *lists, *weights, *numbers)
    if not direct:
        out, lse, _ = torch.ops.navit_kernels.varlen_attention(*shared, differentiable or keep_lse)
        return out, lse
    call = _launcher(*shared, signature=signature)
    if not differentiable:
        return _kernels(call, keep_lse)[:2]
    # Function.apply without its search for what functorch has left behind
    apply = super(torch.autograd.Function, _Attention).apply
    outputs = apply((call, lists, numbers, keep_lse), q, k, v, *weights)
    return outputs if keep_lse else (outputs, None)


def _natural_lse(
    lse_HT: Tensor, q_THD: Tensor, q_norm: HeadNorm | None, k_norm: HeadNorm | None, scale: float
) -> Tensor:
    """From units of log2 to nats, and k_norm's bias, which the kernels leave out, back in."""
    lse_HT = lse_HT * math.log(2)
    if k_norm is not None and k_norm.bias is not None:
        with torch.no_grad():
            n_THD = reference.head_norm(q_THD.float(), q_norm)
            lse_HT = lse_HT + scale * (n_THD * k_norm.bias).sum(-1).T
    return lse_HT


_SHARED = (
    "Tensor q, Tensor? k, Tensor? v, Tensor items, Tensor offsets, Tensor? host_offsets, Tensor? q_weight, "
    "Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, int q_kind, float q_eps, int k_kind, float k_eps, float scale, "
    "bool cross"
)
torch.library.define(
    "navit_kernels::plan",
    "(Tensor cu_seqlens, Tensor? cu_seqlens_k, SymInt tokens, SymInt tokens_k) -> (Tensor, Tensor)",
)
torch.library.define("navit_kernels::varlen_attention", f"({_SHARED}, bool keep_lse) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "navit_kernels::varlen_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, Tensor r, {_SHARED}, bool weight_grads)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def _plan(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, tokens: int, tokens_k: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(cu_seqlens):
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        return launchers().plan_on_device(cu_seqlens, cu_seqlens_k, tokens, tokens_k)


torch.library.impl("navit_kernels::plan", "CUDA", _plan)


@torch.library.register_fake("navit_kernels::plan")
def _(cu_seqlens, cu_seqlens_k, tokens, tokens_k):  # type: ignore[no-untyped-def]
    sides = tokens if cu_seqlens_k is None else tokens + tokens_k
    items = cu_seqlens.new_empty(max_items(sides, cu_seqlens.shape[0] - 1), ITEM_FIELDS)
    return items, cu_seqlens.new_empty(CLASSES + 1)


def _launcher(
    q: Tensor, k: Tensor | None, v: Tensor | None, items: Tensor, offsets: Tensor,
    host_offsets: Tensor | tuple[int, ...] | None, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, q_kind: int, q_eps: float, k_kind: int, k_eps: float, scale: float,
    cross: bool, *, signature: Signature | None = None,
) -> Launcher:  # fmt: skip
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        host_offsets = None  # a captured graph must serve other lengths
    norms = launchers().Norms(q_kind, q_weight, q_bias, q_eps, k_kind, k_weight, k_eps)
    return launchers().Launcher(*arguments.sides(q, k, v), norms, scale, items, offsets, host_offsets, cross, signature)


def _kernels(call: Launcher, save_lse: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    with torch.cuda.device_of(call.q):
        return launchers().forward(call, save_lse)


def _key_sizes_shape(q: Tensor, k: Tensor | None, k_kind: int) -> tuple[int, ...]:
    """Of r, as the registered op returns it: it may be needed; which classes there are, only the kernels' launcher
    knows."""
    if k_kind == 0 or q.dtype == torch.float32:
        return (0,)
    return q.shape[-2], q.shape[0] if k is None else k.shape[0], 2


def _forward(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *shared, keep_lse = rest
    out, lse, r = _kernels(_launcher(q, k, *shared), keep_lse)
    empty = functools.partial(q.new_empty, dtype=torch.float32)
    return out, empty(0) if lse is None else lse, empty(_key_sizes_shape(q, k, rest[-5])) if r is None else r


torch.library.impl("navit_kernels::varlen_attention", "CUDA", _forward)


@torch.library.register_fake("navit_kernels::varlen_attention")
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    tokens, heads, width = q.shape[0], q.shape[-2], q.shape[-1]
    lse = q.new_empty((heads, tokens) if rest[-1] else (0,), dtype=torch.float32)
    r = q.new_empty(_key_sizes_shape(q, k, rest[-5]), dtype=torch.float32)
    return q.new_empty(tokens, heads, width), lse, r


def _backward_kernels(
    dout: Tensor, out: Tensor, lse: Tensor, r: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *shared, weight_grads = rest
    if k is None or v is None:
        dqkv = q.new_empty(q.shape)
        dq, dk, dv = dqkv.unbind(1)
        outputs = (dqkv, q.new_empty(0), q.new_empty(0))
    else:
        dq, dk, dv = outputs = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dout.stride(-1) != 1 or 0 in dout.stride():  # an expanded one would keep TMA away
        dout = dout.contiguous()
    with torch.cuda.device_of(q):
        call = _launcher(q, k, v, *shared)
        weights_H3D = launchers().backward(call, dout, out, lse, r, dq, dk, dv, weight_grads)
    return *outputs, q.new_empty(0, dtype=torch.float32) if weights_H3D is None else weights_H3D


torch.library.impl("navit_kernels::varlen_attention_backward", "CUDA", _backward_kernels)


@torch.library.register_fake("navit_kernels::varlen_attention_backward")
def _(dout, out, lse, r, q, k, v, *rest):  # type: ignore[no-untyped-def]
    grads = [q.new_empty(0) if x is None else q.new_empty(x.shape) for x in (q, k, v)]
    shape = (q.shape[-2], 3, q.shape[-1]) if rest[-1] else (0,)
    return *grads, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[10:-1]
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dout: Tensor | None, needed: Sequence[bool], backward: Callable[..., tuple[Tensor, ...]]
) -> list[Tensor | None]:
    """Of q, k, v and the four parameters; needed: which of the latter."""
    if dout is None:
        return [None] * 7
    out, lse, r, *tensors = ctx.saved_tensors
    dq, dk, dv, weights_H3D = backward(dout, out, lse, r, *tensors, *ctx.numbers, any(needed[:3]))
    packed = tensors[1] is None
    grads: list[Tensor | None] = [dq, None if packed else dk, None if packed else dv]
    for i, weight in enumerate(tensors[6:]):
        if weight is None or not needed[i]:
            grads.append(None)
        elif i == 3:
            grads.append(torch.zeros_like(weight))
        else:
            grad_HD = weights_H3D[:, i]
            grads.append((grad_HD if weight.dim() == 2 else grad_HD.sum(0)).to(weight.dtype))
    return grads


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
    op = torch.ops.navit_kernels.varlen_attention_backward
    grads = _gradients(ctx, dout, ctx.needs_input_grad[6:10], op)
    return *grads[:3], None, None, None, *grads[3:], *(None,) * 7


torch.library.register_autograd("navit_kernels::varlen_attention", _backward, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The registered op, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, rest: Any, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor | None) -> Any:
        call, lists, ctx.numbers, return_lse = rest
        out, lse, r = _kernels(call, True)
        ctx.save_for_backward(out, lse, r, q, k, v, *lists, *weights)
        ctx.set_materialize_grads(False)
        if not return_lse:
            return out
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, dout, ctx.needs_input_grad[4:], _backward_kernels)
