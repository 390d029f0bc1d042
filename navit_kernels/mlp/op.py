"""feed_forward: checks, registration, autograd. T tokens, E model width, M MLP width, U hidden width (M or 2M)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._checks import check_dtype, check_option, check_same, check_shape
from .._direct import define, direct, skips_dispatcher
from . import reference

BACKENDS = ("auto", "reference", "triton")
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def feed_forward(
    x_TE: Tensor,
    up_UE: Tensor,
    down_EM: Tensor,
    up_bias_U: Tensor | None = None,
    down_bias_E: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """f(x · upᵀ + up_bias) · downᵀ + down_bias.

        f(h) = gelu(h), by the tanh formula         "gelu_tanh"         U = M
        f(h) = gelu(h), exact                       "gelu"              U = M
        f(gate, value) = silu(gate) · value         "swiglu"            U = 2M: rows for gates, then for values

    x_TE: (T, E). up_UE: (U, E); down_EM: (E, M); biases (U,), (E,) or None: nn.Linear's layout. All of one dtype, to
        which autocast brings them; the gradients of float32 weights are then float32 from the product on.
    recompute: keep only x for the backward, which then multiplies x and up again: T · U values less for one product
        more. Otherwise the product x · upᵀ is kept too, never its activation. The reference keeps what autograd keeps.
    backend: "auto" runs the reference on CPU tensors, the registered op on CUDA tensors. That takes torch's products
        and activations; in 16 bits on Hopper, E and M multiples of 8, two of the products are kernels that have the
        activation behind them.

    Returns (T, E) in x's dtype. A token's result depends on that token alone, up to what torch's products do.
    """
    check_option("activation", activation, ACTIVATIONS)
    check_option("backend", backend, BACKENDS)
    check_shape("x", x_TE, (None, None), "(T, E)")
    check_shape("down", down_EM, (x_TE.shape[1], None), "(E, M)")
    hidden_width = down_EM.shape[1] * (2 if activation == "swiglu" else 1)
    check_shape("up", up_UE, (hidden_width, x_TE.shape[1]), "(2M, E)" if activation == "swiglu" else "(M, E)")
    for name, tensor, width in (("up_bias", up_bias_U, hidden_width), ("down_bias", down_bias_E, x_TE.shape[1])):
        if tensor is not None:
            check_shape(name, tensor, (width,), "(U,)" if name == "up_bias" else "(E,)")
    takes_reference = backend == "reference" or (backend == "auto" and x_TE.device.type == "cpu")
    dtype = autocast_dtype(x_TE.device)
    op_casts = False
    if dtype is not None:
        x_TE = x_TE.to(dtype)
        op_casts = not takes_reference and up_UE.dtype == down_EM.dtype == torch.float32
        if not op_casts:
            up_UE, down_EM = up_UE.to(dtype), down_EM.to(dtype)
        up_bias_U, down_bias_E = (None if bias is None else bias.to(dtype) for bias in (up_bias_U, down_bias_E))
    others = {"up": up_UE, "down": down_EM, "up_bias": up_bias_U, "down_bias": down_bias_E}
    for name, tensor in others.items():
        if tensor is not None:
            check_same(name, tensor, "x", x_TE, dtype=not (op_casts and name in ("up", "down")))
    if takes_reference:
        return reference.feed_forward(x_TE, up_UE, down_EM, up_bias_U, down_bias_E, activation=activation)
    check_dtype("x", x_TE, DTYPES)
    trained = any(tensor is not None and tensor.requires_grad for tensor in (x_TE, *others.values()))
    keep_hidden = trained and torch.is_grad_enabled() and not recompute
    run = _feed_forward_directly if skips_dispatcher(x_TE) else _feed_forward
    return run(x_TE, up_UE, down_EM, up_bias_U, down_bias_E, activation, keep_hidden)[0]


def _forward_kernel(
    x_TE: Tensor, up_UE: Tensor, down_EM: Tensor, up_bias_U: Tensor | None, down_bias_E: Tensor | None,
    activation: str, keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, hidden, and the weights in x's dtype: empty where they are not wanted, or had it before."""
    from . import kernel

    up_cast_UE, down_cast_EM = up_UE.to(x_TE.dtype), down_EM.to(x_TE.dtype)
    out_TE, hidden_TU = kernel.feed_forward(
        x_TE, up_cast_UE, down_cast_EM, up_bias_U, down_bias_E, activation, keep_hidden
    )
    if hidden_TU is None:
        hidden_TU = x_TE.new_empty(0, up_UE.shape[0])
    if up_UE.dtype == x_TE.dtype:
        up_cast_UE, down_cast_EM = x_TE.new_empty(0), x_TE.new_empty(0)
    return out_TE, hidden_TU, up_cast_UE, down_cast_EM


_feed_forward = define("feed_forward", _forward_kernel)


@torch.library.register_fake("navit_kernels::feed_forward")
def _(x_TE, up_UE, down_EM, up_bias_U, down_bias_E, activation, keep_hidden):  # type: ignore[no-untyped-def]
    cast = up_UE.dtype != x_TE.dtype
    return (
        x_TE.new_empty(x_TE.shape),
        x_TE.new_empty(x_TE.shape[0] if keep_hidden else 0, up_UE.shape[0]),
        *(x_TE.new_empty(weight.shape if cast else (0,)) for weight in (up_UE, down_EM)),
    )


def _backward_kernel(
    dout_TE: Tensor, x_TE: Tensor, hidden_TU: Tensor, up_UE: Tensor, down_EM: Tensor, up_bias_U: Tensor | None,
    activation: str, weight_dtype: torch.dtype | None, down_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dup, ddown, and in float32 dup_bias and ddown_bias; empty what is not wanted."""
    from . import kernel

    kept_TU = hidden_TU if hidden_TU.shape[0] == x_TE.shape[0] else None
    dx_TE, dup_UE, ddown_EM, partial_GU = kernel.feed_forward_backward(
        dout_TE, x_TE, kept_TU, up_UE, down_EM, up_bias_U, activation, weight_dtype
    )
    dup_UE, ddown_EM = (x_TE.new_empty(0) if grad is None else grad for grad in (dup_UE, ddown_EM))
    summed = (x_TE[:, :0] if partial_GU is None else partial_GU,
              dout_TE if weight_dtype is not None and down_bias_grad else dout_TE[:, :0])  # fmt: skip
    dup_bias_U, ddown_bias_E = (part.sum(0, dtype=torch.float32) for part in summed)
    return dx_TE, dup_UE, ddown_EM, dup_bias_U, ddown_bias_E


_feed_forward_backward = define("feed_forward_backward", _backward_kernel)


@torch.library.register_fake("navit_kernels::feed_forward_backward")
def _(dout_TE, x_TE, hidden_TU, up_UE, down_EM, up_bias_U, activation, weight_dtype, down_bias_grad):  # type: ignore[no-untyped-def]
    weight_grads = weight_dtype is not None
    biases = (
        up_UE.shape[0] if weight_grads and up_bias_U is not None else 0,
        x_TE.shape[1] if weight_grads and down_bias_grad else 0,
    )
    return (
        x_TE.new_empty(x_TE.shape),
        *(x_TE.new_empty(w.shape if weight_grads else (0,), dtype=weight_dtype) for w in (up_UE, down_EM)),
        *(x_TE.new_empty(width, dtype=torch.float32) for width in biases),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TE, up_UE, down_EM, up_bias_U, down_bias_E, ctx.activation, _ = inputs
    hidden_TU, *cast = output[1:]
    ctx.has_down_bias, ctx.weight_dtype = down_bias_E is not None, up_UE.dtype
    weights = (up_UE, down_EM) if up_UE.dtype == x_TE.dtype else cast
    ctx.save_for_backward(x_TE, hidden_TU, *weights, up_bias_U)
    ctx.set_materialize_grads(False)


def _gradients(run: Callable[..., Any], ctx: Any, dout_TE: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    up_bias_U, weight_grads = ctx.saved_tensors[-1], any(ctx.needs_input_grad[1:5])
    dx_TE, dup_UE, ddown_EM, dup_bias_U, ddown_bias_E = run(
        dout_TE, *ctx.saved_tensors, ctx.activation, ctx.weight_dtype if weight_grads else None, ctx.has_down_bias
    )
    return (
        dx_TE,
        dup_UE if weight_grads else None,
        ddown_EM if weight_grads else None,
        dup_bias_U.to(dx_TE.dtype) if weight_grads and up_bias_U is not None else None,
        ddown_bias_E.to(dx_TE.dtype) if weight_grads and ctx.has_down_bias else None,
        None,
        None,
    )


torch.library.register_autograd(
    "navit_kernels::feed_forward", functools.partial(_gradients, _feed_forward_backward), setup_context=_setup_context
)
_feed_forward_directly = direct(_forward_kernel, _setup_context, functools.partial(_gradients, _backward_kernel))
