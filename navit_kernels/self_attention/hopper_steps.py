"""Steps of the Hopper kernels, in Gluon: tiles in shared memory, their barriers, and rows of q.

A tile of rows has one or two column parts, so that a head width of 72 takes 64 + 16 columns and not 128: the first part
has PART columns, the second D2 (0 where there is none). Columns past D are zeros and never written.

Rows past a segment's end are no one's business: a ragged descriptor (`_ragged`) zero-fills what is loaded there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._descriptors import describe, fields
from .._jit import BoundKernel

PART = gl.constexpr(64)  # columns of the first part: 128 bytes, the widest that a swizzled tile of shared memory has
ROWS_END = gl.constexpr(1 << 30)  # a ragged descriptor's rows end here

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until Triton 3.6


def parts(width: int) -> tuple[int, int]:
    """Columns of the two parts of a tile; the second's are a power of two, at least 16, or 0."""
    rest = width - PART.value
    return PART.value, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


@functools.cache
def shared_layout(columns: int, rank: int, bits: int = 16) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=columns * bits // 8, element_bitwidth=bits, rank=rank)


@functools.lru_cache(1024)
def _ragged(
    dtype: torch.dtype, heads: int, width: int, strides: tuple[int, ...], rows: int
) -> list[tuple[str, dict[str, Any] | None]]:
    """By column part: its suffix, and what loads (rows, columns) of a head; see `segment_rows` for the coordinates.

    Its axes (wrap, end, head, row, column) reach the rows start + row of any segment while the row axis ends where the
    segment does: row ROWS_END − length + i after `end` tokens, wrapped back by 2^30·2^34 elements, which is 0 modulo
    2^64 bytes.
    """
    stride, head, _ = strides
    shape, strides = (0x7FFF0000, 0x7FFF0000, heads, ROWS_END.value, width), (2**34 - stride, stride, head, stride, 1)
    return [
        (
            f"_{i}",
            fields(dtype, shape, strides, (1, 1, 1, rows, columns), shared_layout(columns, 5)) if columns else None,
        )
        for i, columns in enumerate(parts(width), 1)
    ]


def ragged_parts(width: int, rows: int, **tensors: Tensor) -> dict[str, TensorDescriptor | None]:
    """name_1 and name_2, of the column parts of (T, H, D) tensors; name_2 is None where there is but one."""
    return {
        name + part: None if shared is None else describe(x, shared)
        for name, x in tensors.items()
        for part, shared in _ragged(x.dtype, x.shape[1], width, x.stride(), rows)
    }


def numbers(x: Tensor, block: int) -> TensorDescriptor:
    """Loads `block` float32 numbers."""
    return describe(x, _numbers(x.numel(), block))


@functools.lru_cache(1024)
def _numbers(count: int, block: int) -> dict[str, Any]:
    return fields(torch.float32, (count,), (1,), (block,), shared_layout(0, 1, 32))


def bind(
    kernel: Any, signature: Any, index: int, registers: int | None, **options: Any
) -> BoundKernel:  # fmt: skip
    """A kernel for one class, with those of a signature's numbers that it takes."""
    numbers = signature.norm_numbers | signature.weights | signature.scores | signature.score_gradients
    numbers = {name: value for name, value in numbers.items() if name in kernel.arg_names}
    if registers is not None:
        options["maxnreg"] = registers
    _, second = parts(signature.width)
    return BoundKernel(kernel, **numbers, H=signature.heads, D=signature.width, D2=second, CLASS=index, **options)


@gluon.jit
def items_of_class(offsets_ptr, first_item, items, CLASS: gl.constexpr):
    """kernel.py's, in Gluon."""
    on_device = first_item < 0
    end = gl.load(offsets_ptr + CLASS + 1, mask=on_device, other=first_item + items)
    first_item = gl.load(offsets_ptr + CLASS, mask=on_device, other=first_item)
    return first_item, end - first_item


@gluon.jit
def segment_rows(start, length, row, h, column: gl.constexpr):
    """Coordinates of the rows from `row` of a segment's head."""
    return [ROWS_END, start + length, h, ROWS_END - length + row, column]
