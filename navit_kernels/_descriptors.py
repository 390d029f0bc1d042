"""Descriptors of tensors in memory, by which Hopper's kernels load and store tiles (TMA)."""

from __future__ import annotations

import functools
from itertools import count
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_kinds = count()


@functools.cache
def _kind(dtype: torch.dtype, block: tuple[int, ...], layout: Any) -> int:
    """A number for what kernels are compiled for."""
    return next(_kinds)


def fields(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], layout: Any
) -> dict[str, Any]:
    """All of a descriptor but its tensor: the same in every layer of a model, and so kept by callers."""
    return {
        "shape": list(shape), "strides": list(strides), "block_shape": list(block), "layout": layout,
        "kind": _kind(dtype, block, layout),
    }  # fmt: skip


def describe(base: Tensor, fields: dict[str, Any]) -> TensorDescriptor:
    """A TensorDescriptor without its own checks, which take the host as long as a launch: the address and all strides
    but the last are multiples of 16 bytes."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(fields, base=base)
    return descriptor
