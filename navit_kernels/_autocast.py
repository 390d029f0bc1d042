"""What autocast asks of ops that multiply matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products on a device under autocast; None without autocast, and for meta, which has none."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def joined(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """[torch.cat(group).to(dtype) for each group]: all tensors of a step in one launch, and so their gradients.

    What needs neither is returned as it is.
    """
    parts = [part for group in groups for part in group]
    if torch.compiler.is_compiling() or {part.dtype for part in parts} != {parts[0].dtype} or parts[0].dtype == dtype:
        cast = [[part.to(dtype) for part in group] for group in groups]
        return [torch.cat(group) if len(group) > 1 else group[0] for group in cast]
    return list(_Joined.apply(dtype, [len(group) for group in groups], *parts))


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, counts: list[int], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.counts, ctx.dtype = counts, parts[0].dtype
        ctx.rows = [len(part) for part in parts]
        wholes, slices, first = [], [], 0
        for count in counts:
            rows = ctx.rows[first : first + count]
            wholes.append(parts[first].new_empty(sum(rows), *parts[first].shape[1:], dtype=dtype))
            slices += wholes[-1].split(rows) if count > 1 else wholes[-1:]
            first += count
        torch._foreach_copy_(slices, parts)
        ctx.set_materialize_grads(False)
        return tuple(wholes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *wholes: Tensor | None) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = []
        for count, whole in zip(ctx.counts, wholes, strict=True):
            rows = ctx.rows[len(gradients) : len(gradients) + count]
            gradients += [None] * count if whole is None else whole.split(rows) if count > 1 else [whole]
        given = [gradient for gradient in gradients if gradient is not None]
        cast = [torch.empty_like(gradient, dtype=ctx.dtype) for gradient in given]
        if cast:
            torch._foreach_copy_(cast, given)
        wide = iter(cast)
        return None, None, *(None if gradient is None else next(wide) for gradient in gradients)
