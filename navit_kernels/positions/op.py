"""add_positions: checks, registration, autograd. T tokens, L table rows, E model width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_dtype, check_option, check_same, check_shape, fail
from .._direct import define, direct, skips_dispatcher
from . import reference

BACKENDS = ("auto", "reference", "triton")
COMBINES = ("sum", "concat", "product")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def add_positions(
    x_TE: Tensor,
    coords_T2: Tensor,
    row_table_LE: Tensor,
    column_table_LE: Tensor,
    *,
    combine: str = "sum",
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalize patch embeddings and add where each patch stands, in one pass.

        norm(x) + (row_table[row] + column_table[column])               "sum"
        norm(x) + concatenate(row_table[row], column_table[column])     "concat"
        norm(x) + row_table[row] · column_table[column]                 "product"

    x_TE: (T, E) patch embeddings, tokens in any order.
    coords_T2: (T, 2), (row, column). Integers are rows of the tables. Floats lie in [0, L − 1] and interpolate linearly
        between two rows (`fractional_coords` makes them). Outside the tables: an error on the CPU, clamped on a GPU,
        where reading the values would wait. No gradient.
    row_table_LE, column_table_LE: (L, E), each with its own L; for "concat" of any widths that add up to E.
    norm: (weight (E,), bias (E,) or None, eps) of a LayerNorm of x, or None.
    dtype: of the result, by default x's; arithmetic is at least float32.
    backend: "auto" runs the reference on CPU tensors and the kernel on CUDA tensors.

    Returns (T, E).
    """
    check_shape("x", x_TE, (None, None), "(T, E)")
    check_dtype("x", x_TE, FLOATS)
    check_option("combine", combine, COMBINES)
    check_option("backend", backend, BACKENDS)
    tokens, width = x_TE.shape
    check_shape("coords", coords_T2, (tokens, 2), "(T, 2)")
    check_dtype("coords", coords_T2, (torch.int32, torch.int64, torch.float32, torch.float64))
    check_same("coords", coords_T2, "x", x_TE, dtype=False)
    wanted = None if combine == "concat" else width
    for name, table in (("row_table", row_table_LE), ("column_table", column_table_LE)):
        check_shape(name, table, (None, wanted), "(L, E)")
        check_same(name, table, "x", x_TE, dtype=False)
        if table.shape[0] == 0:
            fail(name, "of at least one row", tuple(table.shape))
    if combine == "concat" and row_table_LE.shape[1] + column_table_LE.shape[1] != width:
        fail(
            "row_table and column_table",
            f"of widths that add up to {width}",
            (row_table_LE.shape[1], column_table_LE.shape[1]),
        )
    if norm is not None:
        for name, tensor in (("norm weight", norm[0]), ("norm bias", norm[1])):
            if tensor is not None:
                check_shape(name, tensor, (width,), "(E,)")
                check_same(name, tensor, "x", x_TE, dtype=False)
    if coords_T2.device.type == "cpu" and tokens and not torch.compiler.is_compiling():
        lengths = torch.tensor([row_table_LE.shape[0], column_table_LE.shape[0]])
        if coords_T2.min() < 0 or (coords_T2.amax(0) > lengths - 1).any():
            fail(
                "coords",
                f"from 0 to {(lengths - 1).tolist()}",
                f"{coords_T2.amin(0).tolist()} to {coords_T2.amax(0).tolist()}",
            )
    if backend == "reference" or (backend == "auto" and x_TE.device.type == "cpu"):
        return reference.add_positions(x_TE, coords_T2, row_table_LE, column_table_LE, combine, norm, dtype)
    check_dtype("x", x_TE, FLOATS[:3])
    check_same("column_table", column_table_LE, "row_table", row_table_LE)
    weight_E, bias_E, eps = norm or (None, None, 0.0)
    run = _add_positions_directly if skips_dispatcher(x_TE) else _add_positions
    return run(x_TE, coords_T2, row_table_LE, column_table_LE, combine, weight_E, bias_E, eps, dtype or x_TE.dtype)


def _forward_kernel(
    x_TE: Tensor, coords_T2: Tensor, row_table_LE: Tensor, column_table_LE: Tensor, combine: str,
    weight_E: Tensor | None, bias_E: Tensor | None, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from . import kernel

    return kernel.add_positions(x_TE, coords_T2, row_table_LE, column_table_LE, combine, weight_E, bias_E, eps, dtype)


_add_positions = define("add_positions", _forward_kernel)


@torch.library.register_fake("navit_kernels::add_positions")
def _(x_TE, coords_T2, row_table_LE, column_table_LE, combine, weight_E, bias_E, eps, dtype):  # type: ignore[no-untyped-def]
    return x_TE.new_empty(x_TE.shape, dtype=dtype)


def _norm_backward_kernel(
    dy_TE: Tensor, x_TE: Tensor, weight_E: Tensor, has_bias: bool, eps: float
) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.norm_backward(dy_TE, x_TE, weight_E, has_bias, eps)


_norm_backward = define("add_positions_norm_backward", _norm_backward_kernel)


@torch.library.register_fake("navit_kernels::add_positions_norm_backward")
def _(dy_TE, x_TE, weight_E, has_bias, eps):  # type: ignore[no-untyped-def]
    return x_TE.new_empty(x_TE.shape), x_TE.new_empty(1 + has_bias, x_TE.shape[1], dtype=torch.float32)


def _table_backward_kernel(
    dy_TE: Tensor, coords_T2: Tensor, row_table_LE: Tensor, column_table_LE: Tensor, combine: str
) -> Tensor:
    from . import kernel

    return kernel.table_backward(dy_TE, coords_T2, row_table_LE, column_table_LE, combine)


_table_backward = define("add_positions_table_backward", _table_backward_kernel)


@torch.library.register_fake("navit_kernels::add_positions_table_backward")
def _(dy_TE, coords_T2, row_table_LE, column_table_LE, combine):  # type: ignore[no-untyped-def]
    return dy_TE.new_empty(row_table_LE.numel() + column_table_LE.numel(), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TE, coords_T2, row_table_LE, column_table_LE, ctx.combine, weight_E, bias_E, ctx.eps, _ = inputs
    ctx.x_dtype, ctx.bias_dtype = x_TE.dtype, None if bias_E is None else bias_E.dtype
    ctx.save_for_backward(None if weight_E is None else x_TE, coords_T2, row_table_LE, column_table_LE, weight_E)


def _gradients(
    norm_backward: Callable[..., Any], table_backward: Callable[..., Any], ctx: Any, dy_TE: Tensor
) -> tuple[Tensor | None, ...]:
    x_TE, coords_T2, row_table_LE, column_table_LE, weight_E = ctx.saved_tensors
    d_row_table_LE = d_column_table_LE = d_weight_E = d_bias_E = None
    if weight_E is None:
        dx_TE = dy_TE.to(ctx.x_dtype)
    else:
        dx_TE, d_norm_NE = norm_backward(dy_TE, x_TE, weight_E, ctx.bias_dtype is not None, ctx.eps)
        d_weight_E = d_norm_NE[0].to(weight_E.dtype)
        d_bias_E = None if ctx.bias_dtype is None else d_norm_NE[1].to(ctx.bias_dtype)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        d_tables = table_backward(dy_TE, coords_T2, row_table_LE, column_table_LE, ctx.combine).to(row_table_LE.dtype)
        d_row_table_LE = d_tables[: row_table_LE.numel()].view(row_table_LE.shape)
        d_column_table_LE = d_tables[row_table_LE.numel() :].view(column_table_LE.shape)
    return dx_TE, None, d_row_table_LE, d_column_table_LE, None, d_weight_E, d_bias_E, None, None


torch.library.register_autograd(
    "navit_kernels::add_positions",
    functools.partial(_gradients, _norm_backward, _table_backward),
    setup_context=_setup_context,
)
_add_positions_directly = direct(
    _forward_kernel, _setup_context, functools.partial(_gradients, _norm_backward_kernel, _table_backward_kernel)
)
