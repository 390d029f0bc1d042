"""From tokens to one vector (or a few) per image."""

from .op import attention_pool, pool_tokens

__all__ = ["attention_pool", "pool_tokens"]
