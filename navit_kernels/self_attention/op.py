"""varlen_attention: checks, registration, autograd. T tokens, H heads, D head width, S segments (images)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autocast import autocast_dtype
from .._checks import check_cu_seqlens, check_dtype, check_option, check_same, check_shape, fail
from .._direct import skips_dispatcher
from ..head_norm import NORM_CODES, HeadNorm, check_head_norm
from ..plan import CLASSES, ITEM_FIELDS, PackPlan, max_items
from . import reference
from .config import SUPPORTED_HEAD_DIMS

BACKENDS = ("auto", "reference", "triton", "fa3", "fa4")
NO_NORM = HeadNorm()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    segments, NaN and inf included. No call waits for the device. Values of cu_seqlens are checked on CPU tensors only
    (`navit_kernels._checks.check_cu_seqlens_values` checks them anywhere, on request): wrong values on a GPU give
    wrong numbers, never a wrong address.

    Raises ValueError naming the argument, what was expected and what came; ImportError for a flash-attn that is not
    installed.
    """
    _check_inputs(q_THD, k_THD, v_THD, cu_seqlens_k is not None)
    q_THD, k_THD, v_THD = _autocast(q_THD, k_THD, v_THD)
    _check_call(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm, k_norm, rope, plan, backend)
    scale = q_THD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if backend in ("fa3", "fa4"):
        from . import flash

        return flash.attention(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm, k_norm, scale, plan, return_lse, backend
        )
    if _takes_reference(backend, q_THD):
        out_THD, lse_HT = reference.varlen_attention(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm=q_norm, k_norm=k_norm, softmax_scale=scale
        )
    else:
        out_THD, lse_HT = _run(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, q_norm, k_norm, scale, plan, return_lse)
        if return_lse:
            lse_HT = _natural_lse(lse_HT, q_THD, q_norm, k_norm, scale)
    return (out_THD, lse_HT.detach()) if return_lse else out_THD


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
    if backend in ("fa3", "fa4") or _takes_reference(backend, qkv_T3HD):
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
        out = varlen_attention(
            q_THD, k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, softmax_scale=softmax_scale, plan=plan,
            backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    (qkv_T3HD,) = _autocast(qkv_T3HD)
    q_THD = qkv_T3HD[:, 0]
    _check_call(q_THD, q_THD, q_THD, cu_seqlens, None, q_norm, k_norm, None, plan, backend)
    scale = q_THD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _run(qkv_T3HD, None, None, cu_seqlens, None, q_norm, k_norm, scale, plan, False)[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def _takes_reference(backend: str, q_THD: Tensor) -> bool:
    check_option("backend", backend, BACKENDS)
    if backend not in ("auto", "reference") and q_THD.device.type == "cpu":
        fail("q", f"on a GPU for backend={backend!r}", q_THD.device)
    return backend == "reference" or (backend == "auto" and q_THD.device.type == "cpu")


def _check_inputs(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cross: bool) -> None:
    """Shapes, dtypes and devices. What nearly every call brings is accepted first, at little cost."""
    if isinstance(q_THD, Tensor) and q_THD.dim() == 3:
        kind = (q_THD.shape, q_THD.dtype, q_THD.device)
        if all(isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == kind for x in (k_THD, v_THD)):
            return
    check_shape("q", q_THD, (None, None, None), "(T, H, D)")
    heads, width = q_THD.shape[1:]
    for name, tensor in (("k", k_THD), ("v", v_THD)):
        check_shape(name, tensor, (None, None, width), "(T, H, D)")
        if tensor.shape[1] != heads:
            fail(name, f"of q's head count {heads} (grouped and multi-query heads are not supported)", tensor.shape[1])
        check_same(name, tensor, "q", q_THD)
    check_shape("v", v_THD, k_THD.shape, "(T, H, D)")
    if not cross:
        check_shape("k", k_THD, q_THD.shape, "(T, H, D)")


def _check_call(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    q_norm: HeadNorm | None, k_norm: HeadNorm | None, rope: None, plan: PackPlan | None, backend: str,
) -> None:  # fmt: skip
    """What both public functions check beyond the shapes of q, k and v."""
    if rope is not None:
        raise NotImplementedError("rope is reserved and must be None")
    check_cu_seqlens("cu_seqlens", cu_seqlens, "q", q_THD)
    if cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k_THD)
        check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens.shape, "(S + 1,)")
    check_head_norm("q_norm", q_norm, "q", q_THD)
    check_head_norm("k_norm", k_norm, "k", k_THD)
    if plan is not None:
        if not isinstance(plan, PackPlan):
            fail("plan", "a PackPlan", type(plan).__name__)
        check_shape("plan.cu_seqlens", plan.cu_seqlens, cu_seqlens.shape, "(S + 1,)")
        check_same("plan.items", plan.items, "q", q_THD, dtype=False)
        if (plan.cu_seqlens_k is None) != (cu_seqlens_k is None):
            fail("plan", "made with lengths_k exactly where cu_seqlens_k is given", plan.cu_seqlens_k)
    if _takes_reference(backend, q_THD):
        return
    check_dtype("q", q_THD, DTYPES if backend in ("auto", "triton") else DTYPES[:2])
    if q_THD.shape[-1] not in SUPPORTED_HEAD_DIMS:
        fail("q", "of a head width D that is a multiple of 8 from 16 to 128", q_THD.shape[-1])
    for name, tensor in (("q", q_THD), ("k", k_THD), ("v", v_THD)):
        if tensor.stride(-1) != 1:
            fail(name, "contiguous over D", f"strides {tensor.stride()}")


def _run(
    q: Tensor, k: Tensor | None, v: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    q_norm: HeadNorm | None, k_norm: HeadNorm | None, scale: float, plan: PackPlan | None, keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernels. k and v are None where q is the packed (T, 3, H, D)."""
    direct = skips_dispatcher(q)
    if plan is None:
        make = _plan if direct else torch.ops.navit_kernels.plan
        items, offsets = make(cu_seqlens, cu_seqlens_k, q.shape[0], q.shape[0] if k is None else k.shape[0])
        host_offsets = None
    else:
        items, offsets, host_offsets = plan.items, plan.offsets, plan.host_offsets
    q_kind, k_kind = (NORM_CODES[None if norm is None else norm.kind] for norm in (q_norm, k_norm))
    q_norm, k_norm = q_norm or NO_NORM, k_norm or NO_NORM
    parameters = (q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias)
    weights = [None if tensor is None else tensor.contiguous() for tensor in parameters]
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (q, k, v, *weights)
    )
    attend: Callable[..., Any] = torch.ops.navit_kernels.varlen_attention
    if direct:
        attend = _Attention.apply if differentiable else _forward
    out, lse, _ = attend(
        q, k, v, items, offsets, host_offsets, *weights, q_kind, q_norm.eps, k_kind, k_norm.eps, scale,
        cu_seqlens_k is not None, differentiable or keep_lse,
    )  # fmt: skip
    return out, lse


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
    from .launch import plan_on_device

    with torch.cuda.device_of(cu_seqlens):
        return plan_on_device(cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, tokens, tokens_k)


torch.library.impl("navit_kernels::plan", "CUDA", _plan)


@torch.library.register_fake("navit_kernels::plan")
def _(cu_seqlens, cu_seqlens_k, tokens, tokens_k):  # type: ignore[no-untyped-def]
    sides = tokens if cu_seqlens_k is None else tokens + tokens_k
    items = cu_seqlens.new_empty(max_items(sides, cu_seqlens.shape[0] - 1), ITEM_FIELDS)
    return items, cu_seqlens.new_empty(CLASSES + 1)


def _launcher(
    q: Tensor, k: Tensor | None, v: Tensor | None, items: Tensor, offsets: Tensor, host_offsets: Tensor | None,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, q_kind: int,
    q_eps: float, k_kind: int, k_eps: float, scale: float, cross: bool,
) -> Any:  # fmt: skip
    from .launch import Launcher, Norms

    if k is None or v is None:
        q, k, v = q.unbind(1)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        host_offsets = None  # a captured graph must serve other lengths
    norms = Norms(q_kind, q_weight, q_bias, q_eps, k_kind, k_weight, k_eps)
    return Launcher(q, k, v, norms, scale, items, offsets, host_offsets, cross)


def _forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .launch import forward

    *shared, keep_lse = rest
    with torch.cuda.device_of(q):
        return forward(_launcher(q, *shared), keep_lse)


torch.library.impl("navit_kernels::varlen_attention", "CUDA", _forward)


@torch.library.register_fake("navit_kernels::varlen_attention")
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    tokens, heads, width = q.shape[0], q.shape[-2], q.shape[-1]
    k_kind, keep_lse = rest[-5], rest[-1]
    tokens_k = tokens if k is None else k.shape[0]
    lse = q.new_empty((heads, tokens) if keep_lse else (0,), dtype=torch.float32)
    needs_r = k_kind != 0 and q.dtype != torch.float32
    return (
        q.new_empty(tokens, heads, width),
        lse,
        q.new_empty((heads, tokens_k, 2) if needs_r else (0,), dtype=torch.float32),
    )


def _backward_kernels(
    dout: Tensor, out: Tensor, lse: Tensor, r: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .launch import backward

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
        weights_H3D = backward(_launcher(q, k, v, *shared), dout, out, lse, r, dq, dk, dv, weight_grads)
    return *outputs, q.new_empty(0, dtype=torch.float32) if weights_H3D is None else weights_H3D


torch.library.impl("navit_kernels::varlen_attention_backward", "CUDA", _backward_kernels)


@torch.library.register_fake("navit_kernels::varlen_attention_backward")
def _(dout, out, lse, r, q, k, v, *rest):  # type: ignore[no-untyped-def]
    grads = [q.new_empty(0) if x is None else q.new_empty(x.shape) for x in (q, k, v)]
    shape = (q.shape[-2], 3, q.shape[-1]) if rest[-1] else (0,)
    return *grads, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *shared, _ = inputs
    ctx.numbers = shared[10:]
    ctx.save_for_backward(*output, *shared[:10])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    out, lse, r, *tensors = ctx.saved_tensors
    nothing = (None,) * 17
    if dout is None:
        return nothing
    weights = tensors[6:]
    weight_grads = any(ctx.needs_input_grad[6:9])
    dq, dk, dv, weights_H3D = backward(dout, out, lse, r, *tensors, *ctx.numbers, weight_grads)
    packed = tensors[1] is None
    grads: list[Tensor | None] = [None] * 4
    for i, weight in enumerate(weights[:3]):
        if weight is not None and ctx.needs_input_grad[6 + i]:
            grad_HD = weights_H3D[:, i]
            grads[i] = (grad_HD if weight.dim() == 2 else grad_HD.sum(0)).to(weight.dtype)
    if weights[3] is not None and ctx.needs_input_grad[9]:
        grads[3] = torch.zeros_like(weights[3])
    return dq, None if packed else dk, None if packed else dv, None, None, None, *grads, *nothing[:7]


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
    return _gradients(ctx, dout, torch.ops.navit_kernels.varlen_attention_backward)


class _Attention(torch.autograd.Function):
    """The registered op, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
        return _gradients(ctx, dout, _backward_kernels)


torch.library.register_autograd("navit_kernels::varlen_attention", _backward, setup_context=_setup_context)
