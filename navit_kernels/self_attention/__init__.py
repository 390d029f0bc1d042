"""Attention inside each image."""

from .op import varlen_attention, varlen_attention_qkvpacked

__all__ = ["varlen_attention", "varlen_attention_qkvpacked"]
