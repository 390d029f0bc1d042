"""Position tables and coordinates into them. Plain torch, small, no wait for the device.

T tokens, S images, L table rows, E model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def sinusoidal_table(length: int, width: int, temperature: float = 10000.0) -> Tensor:
    """Return (length, width) float32: sines of position · temperature^(−2i / width), then the cosines (width even)."""
    frequencies = temperature ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def fourier_frequencies(length: int, width: int) -> Tensor:
    """Return (width / 2,) float32: periods per image side from 1/2 to length / 2, evenly spaced in the logarithm."""
    return torch.logspace(-1, max(-1.0, math.log2(length / 2)), width // 2, base=2)


def fourier_table(length: int, frequencies: Tensor) -> Tensor:
    """Return (length, 2·F): sines, then cosines, of 2π · frequency · (position + ½) / length.

    frequencies: (F,), fixed or a parameter; the table is differentiable in it.
    """
    places = (torch.arange(length, dtype=frequencies.dtype, device=frequencies.device) + 0.5) / length
    angles = 2 * math.pi * places[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def resize_table(table_LE: Tensor, new_length: int) -> Tensor:
    """Interpolate a table linearly to new_length rows, for grids larger than trained; constant beyond the ends."""
    return interpolate(table_LE.T[None], size=new_length, mode="linear", align_corners=False)[0].T


def fractional_coords(coords_T2: Tensor, grids_S2: Tensor, cu_seqlens: Tensor, table_length: int) -> Tensor:
    """Return (T, 2) float32 coordinates in [0, table_length − 1] that stretch every image over the whole table.

    A patch whose centre stands at a fraction f of its image's side gets the table position at that fraction:
    f · table_length − ½, clamped. Looked up in a table, that is the table resized to the image's own grid.

    coords_T2: (T, 2) (row, column). grids_S2: (S, 2) rows and columns of each whole image. cu_seqlens: (S + 1,).
    """
    tokens = torch.arange(coords_T2.shape[0], device=coords_T2.device, dtype=cu_seqlens.dtype)
    image_T = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    sides_T2 = grids_S2[image_T.clamp(max=grids_S2.shape[0] - 1)]
    return ((coords_T2 + 0.5) * (table_length / sides_T2) - 0.5).clamp(0, table_length - 1).float()
