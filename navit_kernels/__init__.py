"""Kernels for native-resolution vision transformers, in the order in which an image flows through them."""

from .head_norm import HeadNorm
from .plan import PackPlan, plan_pack

# isort: split
from .patches import patchify
from .positions import add_positions
from .add_norm import add_norm  # noqa: I001
from .self_attention import varlen_attention, varlen_attention_qkvpacked
from .token_pooling import attention_pool, pool_tokens

__all__ = [
    "HeadNorm",
    "PackPlan",
    "add_norm",
    "add_positions",
    "attention_pool",
    "patchify",
    "plan_pack",
    "pool_tokens",
    "varlen_attention",
    "varlen_attention_qkvpacked",
]
