"""Ops called without the dispatcher, whose way takes the host longer than everything else that it does for a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def nobody_watches() -> bool:
    """Whether what is called is called for itself: it is not traced, and not transformed."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def skips_dispatcher(x: Tensor) -> bool:
    """Whether there are plain tensors, which hold numbers, and nobody who watches what is called on them."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and nobody_watches()


def define(name: str, kernel: Callable[..., Any]) -> Any:
    """Register an op of navit_kernels that changes none of its arguments; torch's custom_op, without the checks that it
    makes in every call. Its fake and its autograd are registered under its name."""
    qualified = f"navit_kernels::{name}"
    torch.library.define(qualified, torch.library.infer_schema(kernel, mutates_args=()))
    torch.library.impl(qualified, "default", kernel)
    return getattr(torch.ops.navit_kernels, name).default


def direct(kernel: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The function that `torch.library` would make of these, for tensors with skips_dispatcher.

    kernel: from an op's arguments to its outputs. setup_context, backward: what register_autograd takes; backward's
        own ops are called directly, too.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = kernel(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    # Function.apply, without a look for what functorch has left, which skips_dispatcher has seen to
    apply = super(torch.autograd.Function, Direct).apply

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return apply(*inputs)
        return kernel(*inputs)

    return call
