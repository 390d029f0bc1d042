"""PackPlan: which program works on what, decided once per pack and shared by all layers.

A segment's code path depends on its own length alone (the longer of its query and key side): segments fall into
classes by CLASS_LIMITS. Up to the last limit, one work item is one whole segment. Longer ones are cut into tiles of
TILE rows, an item each. Items stand class by class, the longest segments of a class first.

S segments, N work items.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from ._checks import fail

CLASS_LIMITS = (32, 64, 128, 256)  # tokens
CLASSES = len(CLASS_LIMITS) + 1
TILE = 128  # rows of an item in the last class
ITEM_FIELDS = 8  # q_start, q_length, k_start, k_length, tile, segment, 0, 0: one 32-byte sector


@dataclass(frozen=True)
class PackPlan:
    """Work lists of one pack: tensors only, the same structure for every pack. Made by `plan_pack`.

    cu_seqlens: int32 (S + 1,) on the device; cu_seqlens_k: the same for the key side, or None when that is the same.
    items: int32 (N, 8) on the device; see ITEM_FIELDS.
    offsets: int32 (CLASSES + 1,) on the device; class c owns items[offsets[c]:offsets[c + 1]].
    host_offsets: int32 (CLASSES + 5,) on the CPU: the same numbers, so that a launch needs no wait for the device; then
        the tokens of the longest segment on the query side and on the key side, which flash-attn asks for; then the
        tokens of all segments on each side, so that a plan of another pack is noticed. Without it
        (None) kernels read the device's copy: launches then do not depend on the lengths, and a captured CUDA graph
        serves every pack whose token and segment counts have the captured shapes.

    Example: lengths (300, 20) give items (0, 300, 0, 300, tile, 0, 0, 0) for tile = 0, 1, 2 in the last class, and
    (300, 20, 300, 20, 0, 1, 0, 0) in the first: offsets (0, 1, 1, 1, 1, 4), host_offsets the same and then
    (300, 300, 320, 320).
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None
    items: Tensor
    offsets: Tensor
    host_offsets: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackPlan:
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if field.name != "host_offsets" and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackPlan:
        pinned = {f.name: v.pin_memory() for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(self, **pinned)

    def without_host_offsets(self) -> PackPlan:
        """The same plan for CUDA graphs: launches read the class sizes on the device."""
        return replace(self, host_offsets=None)


def max_items(tokens: int, segments: int) -> int:
    """The most items that `segments` segments of `tokens` tokens in all can give; at least 2, so that no compiler
    takes the size for a constant."""
    return segments + tokens // TILE + 2


def check_plan_tokens(host_offsets: Sequence[int], tokens: int, tokens_k: int) -> None:
    """Refuse a plan of another pack."""
    if list(host_offsets[-2:]) != [tokens, tokens_k]:
        fail("plan", f"of {tokens} tokens of q and {tokens_k} of k", f"of {host_offsets[-2]} and {host_offsets[-1]}")


def int64_tensor(numbers: Iterable[int]) -> Tensor:
    """torch.tensor(numbers), which takes ten times as long over many."""
    values = array("q", numbers)
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.zeros(0, dtype=torch.int64)


def plan_pack(
    lengths: Sequence[int], device: torch.device | str = "cpu", lengths_k: Sequence[int] | None = None
) -> PackPlan:
    """Plan a pack from lengths known on the host.

    lengths: tokens per segment, each at least 0. lengths_k: the key side's, when it differs (cross attention).
    Costs no wait for the device. Raises ValueError for a negative length or sides of different counts.
    """
    if lengths_k is not None and len(lengths_k) != len(lengths):
        fail("lengths_k", f"one length per segment, {len(lengths)} in all", len(lengths_k))
    lists = [lengths, lengths if lengths_k is None else lengths_k]
    longest_side, tokens = [max(numbers, default=0) for numbers in lists], [sum(numbers) for numbers in lists]
    shortest = min(min(numbers, default=0) for numbers in lists)
    if shortest < 0:
        fail("lengths", "at least 0", shortest)
    sides = [int64_tensor(numbers) for numbers in (lists if lengths_k is not None else lists[:1])]
    ends = [side.cumsum(0) for side in sides]
    longest = sides[0] if len(sides) == 1 else torch.maximum(*sides)
    # bucketize, searchsorted and repeat_interleave would wake a pool of threads, which takes longer than all of this
    classes = (longest[:, None] > torch.tensor(CLASS_LIMITS)).sum(1)
    tiles = torch.where(classes == CLASSES - 1, (longest + TILE - 1) // TILE, longest > 0)
    order = torch.argsort(classes * (1 << 40) - longest, stable=True)
    sizes = torch.zeros(CLASSES, dtype=torch.int64).index_add_(0, classes, tiles).tolist()
    offsets, count = [*accumulate(sizes, initial=0)], sum(sizes)
    item_ends = tiles[order].cumsum(0)
    firsts = item_ends - tiles[order]
    begun = torch.zeros(count + 1, dtype=torch.int64).index_add_(0, firsts, torch.ones_like(firsts))
    rank = begun[:count].cumsum(0) - 1
    segment, first = order[rank], firsts[rank]
    columns = [column[segment] for side, end in zip(sides, ends, strict=True) for column in (end - side, side)]
    items = torch.zeros(max_items(int(longest.sum()), len(lengths)), ITEM_FIELDS, dtype=torch.int32)
    items[:count, :6] = torch.stack([*(columns * 2)[:4], torch.arange(count) - first, segment], 1)
    cu_seqlens = [torch.nn.functional.pad(end, (1, 0)).to(torch.int32) for end in ends]
    plan = PackPlan(
        cu_seqlens[0],
        None if lengths_k is None else cu_seqlens[1],
        items,
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor([*offsets, *longest_side, *tokens], dtype=torch.int32),
    )
    return plan.to(device, non_blocking=True)
