"""NaViT: vision transformers on images of any size and aspect ratio."""

from .packing import PackedImages, in_given_order, pack, plan_packs

__all__ = ["PackedImages", "in_given_order", "pack", "plan_packs"]
