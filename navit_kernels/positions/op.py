"""add_positions: checks and dispatch. T tokens, L table rows, E model width."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_dtype, check_option, check_same, check_shape, fail
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
    return reference.add_positions(x_TE, coords_T2, row_table_LE, column_table_LE, combine, norm, dtype)
