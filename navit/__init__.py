"""NaViT: vision transformers on images of any size and aspect ratio."""

from .config import NaViTConfig
from .model import NaViT
from .packing import PackedImages, in_given_order, pack, plan_packs

__all__ = ["NaViT", "NaViTConfig", "PackedImages", "in_given_order", "pack", "plan_packs"]
