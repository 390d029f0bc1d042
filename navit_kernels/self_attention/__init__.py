"""Attention inside each image."""

from .op import varlen_attention

__all__ = ["varlen_attention"]
