"""Triton helpers with two or more callers. T tokens, S segments (images)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_of(offs_t, mask_t, cu_seqlens_ptr, segments):
    """The segment that owns each token: the last one that starts at or before it, found by bisection."""
    first = tl.zeros_like(offs_t)
    size = segments
    while size > 1:
        half = size // 2
        starts = tl.load(cu_seqlens_ptr + first + half, mask=mask_t, other=0)
        first = tl.where(starts <= offs_t, first + half, first)
        size -= half
    return first
