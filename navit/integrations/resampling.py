"""Position grids as image models resample them, value by value where tokens stand: no grid per image size is made, and
nothing waits for the device.

A table of (rows, columns) is resampled to an image's own grid as torch.nn.functional.interpolate does it, which is
separable: a token's position is Σ row_weight[i] · column_weight[j] · table[i, j].

T tokens, R rows and C columns of the table, L either of them, K taps, E model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MODES = ("bilinear", "bicubic")


def resampled_positions(
    table_RCE: Tensor,
    coords_T2: Tensor,
    sizes_T2: Tensor,
    mode: str = "bicubic",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """interpolate(table, size, mode, align_corners, antialias)[row, column] for each token's own size, row and column.

    coords_T2: (T, 2) rows and columns; a token in a negative row gets zeros. sizes_T2: (T, 2), rows and columns of the
        grid that each token stands in.
    mode: "bilinear" or "bicubic".

    Returns (T, E) float32, differentiable in the table. With antialias, multiplies by (T, R · C) weights in float32;
    without, gathers 4 (bilinear) or 16 (bicubic) rows of the table per token.
    """
    rows, columns, width = table_RCE.shape
    table = table_RCE.reshape(rows * columns, width).float()
    inside_T1 = coords_T2[:, :1] >= 0
    axes = [(coords_T2[:, axis], sizes_T2[:, axis], length) for axis, length in enumerate((rows, columns))]
    if antialias:
        row_weights, column_weights = (antialiased_weights(*axis, mode, align_corners) for axis in axes)
        weights = (torch.where(inside_T1, row_weights, 0.0)[:, :, None] * column_weights[:, None]).flatten(1)
        kind = "cuda" if table.device.type == "meta" else table.device.type
        with torch.autocast(kind, enabled=False):
            return weights @ table
    (row_taps, row_weights), (column_taps, column_weights) = (
        weighted_taps(*axis, mode, align_corners) for axis in axes
    )
    taps = (row_taps[:, :, None] * columns + column_taps[:, None]).flatten(1)
    weights = (torch.where(inside_T1, row_weights, 0.0)[:, :, None] * column_weights[:, None]).flatten(1)
    return embedding_bag(taps, table, per_sample_weights=weights, mode="sum")


def weighted_taps(
    place_T: Tensor, size_T: Tensor, length: int, mode: str, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Rows of a table of `length` rows that row `place` of its resampling to `size` rows is made of: (T, K) indices and
    float32 weights, K = 2 or 4. Beyond the ends the first and last row repeat."""
    scale_T = _scale(size_T, length, align_corners)
    source_T = scale_T * place_T if align_corners else scale_T * (place_T + 0.5) - 0.5
    first_T = source_T.floor()
    reach = 1 if mode == "bilinear" else 2
    steps_K = torch.arange(1 - reach, reach + 1, device=place_T.device)
    filtered_TK = _filter((source_T - first_T)[:, None] - steps_K, mode, sharpness=-0.75)
    return (first_T.long()[:, None] + steps_K).clamp(0, length - 1), filtered_TK


def antialiased_weights(place_T: Tensor, size_T: Tensor, length: int, mode: str, align_corners: bool) -> Tensor:
    """(T, L) float32 weights of all rows of a table in row `place` of its antialiased resampling to `size` rows."""
    scale_T = _scale(size_T, length, align_corners)
    rows_L = torch.arange(length, device=place_T.device)
    distance_TL = rows_L - (scale_T * (place_T + 0.5))[:, None] + 0.5
    filtered_TL = _filter(distance_TL / scale_T.clamp(min=1)[:, None], mode, sharpness=-0.5)
    return filtered_TL / filtered_TL.sum(1, keepdim=True)


def _scale(size_T: Tensor, length: int, align_corners: bool) -> Tensor:
    """Rows of the table per row of the resampled one."""
    if align_corners:
        return torch.where(size_T > 1, (length - 1) / (size_T - 1).clamp(min=1).float(), 0.0)
    return length / size_T.float()


def _filter(distance: Tensor, mode: str, sharpness: float) -> Tensor:
    """The triangle filter, or Keys' cubic one with the parameter a = sharpness."""
    x = distance.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((sharpness + 2) * x - (sharpness + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * sharpness
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
