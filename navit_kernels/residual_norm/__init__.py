"""From one branch of a block to the next: residual addition and normalization in one pass."""

from .op import add_norm

__all__ = ["add_norm"]
