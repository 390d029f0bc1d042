"""Reference: add the positions of rows and columns. Plain torch, differentiable in x, both tables and norm.

T tokens, L table rows, E model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def look_up(table_LE: Tensor, coords_T: Tensor) -> Tensor:
    """Rows of a table: table[i] for integer coordinates, linear interpolation between two rows for float ones."""
    if not coords_T.is_floating_point():
        return table_LE[coords_T.long()]
    coords_T = coords_T.to(table_LE.dtype)
    lower_T = coords_T.floor()
    fraction_T1 = (coords_T - lower_T)[:, None]
    below_T = lower_T.long()
    above_T = (below_T + 1).clamp(max=table_LE.shape[0] - 1)
    return (1 - fraction_T1) * table_LE[below_T] + fraction_T1 * table_LE[above_T]


def add_positions(
    x_TE: Tensor,
    coords_T2: Tensor,
    row_table: Tensor,
    column_table: Tensor,
    combine: str = "sum",
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return norm(x) + combine(row_table[row], column_table[column]). See op.add_positions."""
    out_dtype = dtype or x_TE.dtype
    compute = torch.promote_types(x_TE.dtype, torch.float32)
    x_TE = x_TE.to(compute)
    if norm is not None:
        weight_E, bias_E, eps = norm
        bias_E = None if bias_E is None else bias_E.to(compute)
        x_TE = layer_norm(x_TE, (x_TE.shape[1],), weight_E.to(compute), bias_E, eps)
    rows = look_up(row_table.to(compute), coords_T2[:, 0])
    columns = look_up(column_table.to(compute), coords_T2[:, 1])
    if combine == "sum":
        positions_TE = rows + columns
    elif combine == "product":
        positions_TE = rows * columns
    else:
        positions_TE = torch.cat([rows, columns], 1)
    return (x_TE + positions_TE).to(out_dtype)
