"""Kernels for native-resolution vision transformers, in the order in which an image flows through them."""

from . import block  # noqa: F401  its op is known to torch then
from .head_norm import HeadNorm
from .mlp import feed_forward
from .patches import patchify
from .plan import PackPlan, plan_pack
from .positions import add_positions
from .residual_norm import add_norm
from .self_attention import varlen_attention, varlen_attention_qkvpacked
from .token_pooling import attention_pool, pool_tokens

__all__ = [
    "HeadNorm",
    "PackPlan",
    "add_norm",
    "add_positions",
    "attention_pool",
    "feed_forward",
    "patchify",
    "plan_pack",
    "pool_tokens",
    "varlen_attention",
    "varlen_attention_qkvpacked",
]
