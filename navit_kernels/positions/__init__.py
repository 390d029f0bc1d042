"""Where a token stands in its image: rows and columns of learned, sinusoidal or Fourier tables."""

from .op import add_positions
from .tables import fourier_frequencies, fourier_table, fractional_coords, resize_table, sinusoidal_table

__all__ = [
    "add_positions",
    "fourier_frequencies",
    "fourier_table",
    "fractional_coords",
    "resize_table",
    "sinusoidal_table",
]
