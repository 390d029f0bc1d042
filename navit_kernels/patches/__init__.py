"""From ragged images to packed patches."""

from .op import patchify
from .pixels import KeptPatches, PixelBuffer

__all__ = ["KeptPatches", "PixelBuffer", "patchify"]
