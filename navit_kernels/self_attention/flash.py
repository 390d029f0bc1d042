"""flash-attn behind one norm pass: backend="fa3" and "fa4" of varlen_attention.

T tokens, H heads, D head width, S segments (images).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..head_norm import NORM_CODES, HeadNorm
from ..plan import PackPlan, check_plan_tokens

Attend = Callable[..., tuple[Tensor, Tensor | None]]


def attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    q_norm: HeadNorm | None, k_norm: HeadNorm | None, scale: float, plan: PackPlan | None, return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """varlen_attention with backend "fa3" or "fa4", of checked arguments. Raises ImportError without flash-attn."""
    attend = load(backend)
    if plan is not None and plan.host_offsets is not None:
        check_plan_tokens(plan.host_offsets.tolist(), q_THD.shape[0], k_THD.shape[0])
    if q_norm is not None or k_norm is not None:
        q_THD, k_THD = normalize(q_THD, k_THD, q_norm, k_norm)
    if q_THD.shape[0] == 0 or k_THD.shape[0] == 0:
        # zeros, so that every input still gets its gradient; sums over no keys are zeros, too
        everywhere = torch.ones((), dtype=torch.bool, device=q_THD.device)
        out_THD = q_THD.masked_fill(everywhere, 0) + k_THD.sum() + v_THD.sum()
        lse_HT = q_THD.new_full(q_THD.shape[1::-1], -torch.inf, dtype=torch.float32)
        return (out_THD, lse_HT) if return_lse else out_THD
    longest, longest_k = _longest(plan, cu_seqlens, cu_seqlens_k)
    out_THD, lse_or_none = attend(
        q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, longest, longest_k,
        scale, return_lse,
    )  # fmt: skip
    if not return_lse:
        return out_THD
    assert lse_or_none is not None
    lse_HT = lse_or_none.detach().masked_fill(lse_or_none.isposinf(), -torch.inf)  # without keys, in some versions
    if k_norm is not None and k_norm.bias is not None:  # which the norm pass leaves out
        lse_HT = lse_HT + scale * (q_THD.detach().float() * k_norm.bias.detach()).sum(-1).T
    return out_THD, lse_HT


def _longest(plan: PackPlan | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> list[int]:
    """Tokens of the longest segment on the query side and on the key side. Waits for the device without a plan."""
    if plan is not None and plan.host_offsets is not None:
        return plan.host_offsets[-4:-2].tolist()
    ends = torch.stack([cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k])
    return ends.diff().amax(1).tolist()


# flash-attn


INSTALL = {
    "fa3": "FlashAttention-3: install flash_attn_3 (no extra of navit-kernels does), or load a library that registers "
    "torch.ops.flash_attn_3",
    "fa4": "FlashAttention-4: pip install 'navit-kernels[fa]'",
}


def load(backend: str) -> Attend:
    """attend(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, scale, return_lse) -> (out, lse)."""
    try:
        if backend == "fa4":
            import flash_attn.cute.interface  # noqa: F401
        elif not hasattr(torch.ops.flash_attn_3, "fwd"):
            import flash_attn_interface  # noqa: F401
    except ImportError as error:
        raise ImportError(f"backend={backend!r} needs {INSTALL[backend]} ({error})") from error
    return _fa4 if backend == "fa4" else _fa3


@torch.compiler.disable
def _fa4(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, longest: int,
    longest_k: int, scale: float, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from flash_attn.cute.interface import flash_attn_varlen_func

    out_THD, lse_HT = flash_attn_varlen_func(
        q_THD, k_THD, v_THD, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=longest,
        max_seqlen_k=longest_k, softmax_scale=scale, return_lse=return_lse,
    )  # fmt: skip
    return out_THD, lse_HT


@torch.compiler.disable
def _fa3(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, longest: int,
    longest_k: int, scale: float, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return _Fa3.apply(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, longest, longest_k, scale)


class _Fa3(torch.autograd.Function):
    """FlashAttention-3 through its ops: a library loaded without its Python module is enough."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, longest: int,
        longest_k: int, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.options = dict(max_seqlen_q=longest, max_seqlen_k=longest_k, softmax_scale=scale)
        out_THD, lse_HT, *_ = torch.ops.flash_attn_3.fwd(
            q_THD, k_THD, v_THD, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **ctx.options
        )
        ctx.save_for_backward(q_THD, k_THD, v_THD, out_THD, lse_HT, cu_seqlens, cu_seqlens_k)
        ctx.mark_non_differentiable(lse_HT)
        ctx.set_materialize_grads(False)
        return out_THD, lse_HT

    @staticmethod
    def backward(ctx: Any, dout_THD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout_THD is None:
            return (None,) * 8
        q_THD, k_THD, v_THD, out_THD, lse_HT, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
        dq_THD, dk_THD, dv_THD = (x.new_empty(x.shape) for x in (q_THD, k_THD, v_THD))
        torch.ops.flash_attn_3.bwd(
            dout_THD.contiguous(), q_THD, k_THD, v_THD, out_THD, lse_HT, dq=dq_THD, dk=dk_THD, dv=dv_THD,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **ctx.options,
        )  # fmt: skip
        return dq_THD, dk_THD, dv_THD, None, None, None, None, None


# The norm pass


def normalize(q_THD: Tensor, k_THD: Tensor, q_norm: HeadNorm | None, k_norm: HeadNorm | None) -> tuple[Tensor, Tensor]:
    """q_norm(q) and k_norm(k), the latter without its bias, in one launch; a side without a norm passes through."""
    kinds = [0 if norm is None else NORM_CODES[norm.kind] for norm in (q_norm, k_norm)]
    q_side, k_side = q_norm or HeadNorm(), k_norm or HeadNorm()
    q_out, k_out = torch.ops.navit_kernels.head_norms(
        q_THD, k_THD, q_side.weight, q_side.bias, k_side.weight, k_side.bias, kinds[0], q_side.eps, kinds[1], k_side.eps
    )
    return q_THD if q_norm is None else q_out, k_THD if k_norm is None else k_out


_SHARED = (
    "Tensor q, Tensor k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, int q_kind, float q_eps, "
    "int k_kind, float k_eps"
)
torch.library.define("navit_kernels::head_norms", f"({_SHARED}) -> (Tensor, Tensor)")
torch.library.define(
    "navit_kernels::head_norms_backward",
    f"(Tensor q_dout, Tensor k_dout, {_SHARED}, bool q_sums, bool k_sums) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _sides(
    q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
    k_bias: Tensor | None, q_kind: int, q_eps: float, k_kind: int, k_eps: float,
) -> Any:  # fmt: skip
    from .kernel_flash import Side

    return Side(q, q_kind, q_weight, q_bias, q_eps), Side(k, k_kind, k_weight, None, k_eps)


def _forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from .kernel_flash import forward

    with torch.cuda.device_of(q):
        return forward(*_sides(q, *rest))


torch.library.impl("navit_kernels::head_norms", "CUDA", _forward)


@torch.library.register_fake("navit_kernels::head_norms")
def _(q, k, q_weight, q_bias, k_weight, k_bias, q_kind, q_eps, k_kind, k_eps):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape if q_kind else (0,)), k.new_empty(k.shape if k_kind else (0,))


def _backward_kernel(q_dout: Tensor, k_dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from .kernel_flash import backward

    *shared, q_sums, k_sums = rest
    q_side, k_side = _sides(q, *shared)
    with torch.cuda.device_of(q):
        return backward(q_side, k_side, q_dout, k_dout, q_sums, k_sums)


torch.library.impl("navit_kernels::head_norms_backward", "CUDA", _backward_kernel)


@torch.library.register_fake("navit_kernels::head_norms_backward")
def _(q_dout, k_dout, q, k, *rest):  # type: ignore[no-untyped-def]
    q_kind, k_kind, q_sums, k_sums = rest[4], rest[6], rest[8], rest[9]
    sums = [q.new_empty((q.shape[1], 2, q.shape[2]) if w else (0,), dtype=torch.float32) for w in (q_sums, k_sums)]
    return q.new_empty(q.shape if q_kind else (0,)), k.new_empty(k.shape if k_kind else (0,)), *sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _backward(ctx: Any, q_dout: Tensor, k_dout: Tensor) -> tuple[Tensor | None, ...]:
    vectors = ctx.saved_tensors[2:]
    sums = any(ctx.needs_input_grad[2:4]), ctx.needs_input_grad[4]
    dq, dk, q_sums, k_sums = torch.ops.navit_kernels.head_norms_backward(
        q_dout, k_dout, *ctx.saved_tensors, *ctx.numbers, *sums
    )
    grads: list[Tensor | None] = [None] * 4
    for i, (vector, sums_H2D) in enumerate(zip(vectors, (q_sums, q_sums, k_sums, None), strict=True)):
        if vector is not None and ctx.needs_input_grad[2 + i]:
            if sums_H2D is None:
                grads[i] = torch.zeros_like(vector)  # behind a softmax
                continue
            grad_HD = sums_H2D[:, i % 2]
            grads[i] = (grad_HD if vector.dim() == 2 else grad_HD.sum(0)).to(vector.dtype)
    q_kind, _, k_kind, _ = ctx.numbers
    return dq if q_kind else None, dk if k_kind else None, *grads, None, None, None, None


torch.library.register_autograd("navit_kernels::head_norms", _backward, setup_context=_setup_context)
