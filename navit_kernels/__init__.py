"""Kernels for native-resolution vision transformers, in the order in which an image flows through them."""

from .head_norm import HeadNorm
from .plan import PackPlan, plan_pack
from .self_attention import varlen_attention

__all__ = ["HeadNorm", "PackPlan", "plan_pack", "varlen_attention"]
