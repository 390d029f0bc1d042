"""What autocast asks of ops that multiply matrices."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products on a device under autocast; None without autocast, and for meta, which has none."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
