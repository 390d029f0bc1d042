"""Argument checks with one wording: the argument's name, what was expected, what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raise ValueError in the house's wording."""
    raise ValueError(f"{name} must be {expected}, got {got}")


def check_shape(name: str, tensor: Tensor, shape: Iterable[int | None], legend: str) -> None:
    """Check a tensor's shape; None stands for any size. `legend` names the axes: "(T, H, D)"."""
    if not isinstance(tensor, Tensor):
        fail(name, f"a tensor {legend}", type(tensor).__name__)
    shape = tuple(shape)
    matches = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        fail(name, f"{legend} = ({wanted})", tuple(tensor.shape))


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        fail(name, " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes), tensor.dtype)


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    """Check that a tensor lives on the device of another and, unless dtype=False, has its dtype."""
    if tensor.device != like.device:
        fail(name, f"on {like_name}'s device {like.device}", tensor.device)
    if dtype and tensor.dtype != like.dtype:
        fail(name, f"of {like_name}'s dtype {like.dtype}", tensor.dtype)


def check_option(name: str, value: object, options: Iterable[object]) -> None:
    options = tuple(options)
    if value not in options:
        fail(name, " or ".join(repr(option) for option in options), repr(value))


def check_cu_seqlens(name: str, cu_seqlens: Tensor, like_name: str, like: Tensor) -> None:
    """Check what can be checked without waiting for a GPU; on a CPU tensor also the values (T = like.shape[0])."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        fail(name, "a tensor (S + 1,)", got)
    check_dtype(name, cu_seqlens, (torch.int32,))
    check_same(name, cu_seqlens, like_name, like, dtype=False)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_cu_seqlens_values(name, cu_seqlens, like.shape[0])


def check_equal(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check two tensors of one shape, on CPU tensors alone: on a GPU it would be a wait."""
    if tensor is other or torch.compiler.is_compiling() or {tensor.device.type, other.device.type} != {"cpu"}:
        return
    if not torch.equal(tensor, other):
        at = int((tensor != other).int().argmax())
        fail(name, f"equal to {other_name}, {int(other[at])} at position {at}", int(tensor[at]))


def check_cu_seqlens_values(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Check that cu_seqlens starts at 0, never decreases and ends at `tokens`. Waits for the GPU."""
    values = cu_seqlens.detach().cpu()
    if values[0] != 0:
        fail(f"{name}[0]", "0", int(values[0]))
    steps = values.diff()
    if steps.numel() and steps.min() < 0:
        at = int(steps.argmin())
        fail(name, "non-decreasing", f"{int(values[at])} followed by {int(values[at + 1])} at position {at}")
    if values[-1] != tokens:
        fail(f"{name}[-1]", f"the number of tokens, {tokens}", int(values[-1]))
