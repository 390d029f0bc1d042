"""Packing: images of any size → packs of one token budget, without padding.

Three decisions, in this order: which tokens of an image are kept (`drop_tokens`), which images share a pack
(`plan_packs`), how a pack is laid out (`PackedImages`). All are taken on the CPU, as in a data loader's worker.

T tokens, S images (segments), P patch values, C channels.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from navit_kernels import PackPlan, plan_pack
from navit_kernels.patches import PixelBuffer

DropRate = float | Callable[[int, int], float]  # a constant, or a function of (rows, columns)
STRATEGIES = ("best_fit", "next_fit")


@dataclass(frozen=True)
class PackedImages:
    """Images laid end to end: what a NaViT takes. Made by `pack`.

    pixels: all images in one flat buffer, or None where `patches` is given.
    patches: (T, P) patch values that were cut and normalized before, or None.
    cu_seqlens: int32 (S + 1,); segment s owns the patches cu_seqlens[s] : cu_seqlens[s + 1].
    coords: int32 (T, 2), row and column of each patch in its image; row-major inside an image.
    grids: int32 (S, 2), rows and columns of the whole image, dropped patches counted.
    order: int64, ascending: the place of each image in the list that the caller packed. Every segment is an image; only
        `navit.graphs.pad_pack` adds segments behind them.
    patch_size: pixels per side of a patch.
    plan: work lists for attention over the patches and `prefix_tokens` more per image, or None.
    prefix_tokens: how many tokens the model puts before each image's patches (cls and registers).
    token_budget: what the pack may hold, prefix tokens included, or None when it was not limited.
    padded: whether segments of padding stand behind the images.

    Example: two images of 2 × 3 and 1 × 2 patches, places 0 and 2 of the caller's list, the first without patch (0, 0):

    >>> images = [torch.zeros(3, 32, 48), torch.zeros(3, 48, 16), torch.zeros(3, 16, 32)]
    >>> packs = pack(images, 7, patch_size=16, token_drop=lambda rows, columns: 1 / 6 if rows == 2 else 0, seed=4)
    >>> [packed.order.tolist() for packed in packs], [packed.fill for packed in packs]
    ([[0, 2], [1]], [1.0, 0.42857142857142855])
    >>> packs[0].cu_seqlens.tolist(), packs[0].grids.tolist()
    ([0, 5, 7], [[2, 3], [1, 2]])
    >>> packs[0].coords.tolist()
    [[0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1]]
    """

    pixels: PixelBuffer | None
    patches: Tensor | None
    cu_seqlens: Tensor
    coords: Tensor
    grids: Tensor
    order: Tensor
    patch_size: int
    plan: PackPlan | None = None
    prefix_tokens: int = 0
    token_budget: int | None = None
    padded: bool = False

    def __len__(self) -> int:
        """Images in the pack."""
        return self.order.shape[0]

    @property
    def segments(self) -> int:
        """Images, and segments of padding."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def tokens(self) -> int:
        """Tokens of the images, prefix tokens included. Where there is padding, this waits for a GPU."""
        patches = int(self.cu_seqlens[len(self)]) if self.padded else self.coords.shape[0]
        return patches + self.prefix_tokens * len(self)

    @property
    def fill(self) -> float:
        """Share of the token budget that is used; 1.0 without a budget."""
        return self.tokens / self.token_budget if self.token_budget else 1.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedImages:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedImages:
        """The same pack in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> PackedImages:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        movable = {name: part for name, part in parts.items() if part is not None and not isinstance(part, int)}
        return replace(self, **{name: change(part) for name, part in movable.items()})


for structure in (PackedImages, PixelBuffer, PackPlan):  # what torch.export needs to take a pack apart, and to load one
    torch.export.register_dataclass(structure, serialized_type_name=f"navit.{structure.__name__}")
    torch.serialization.add_safe_globals([structure])


def pack(
    images: Sequence[Tensor],
    token_budget: int | None,
    *,
    patch_size: int,
    image_budget: int | None = None,
    strategy: str = "best_fit",
    window: int = 1024,
    token_drop: DropRate | None = None,
    prefix_tokens: int = 0,
    max_side: int | None = None,
    seed: int | np.random.Generator = 0,
) -> list[PackedImages]:
    """Pack images under a token budget.

    images: (C, H, W) tensors, all uint8 or all of one float dtype, with the same C; H and W multiples of patch_size.
    token_budget: tokens per pack at most, or None for one pack of everything. image_budget: images per pack at most.
    strategy, window: see `plan_packs`.
    token_drop: share of an image's patches to drop, in [0, 1): a constant or a function of (rows, columns). At least
        one patch stays. The same seed drops the same patches, however the images are packed.
    patch_size, prefix_tokens (tokens that the model adds per image), max_side (patches per side at most): what the
        model needs, `**config.pack_options`.

    Returns packs on the images' device; inside a pack, images keep the caller's order. Raises ValueError, naming the
    image, for one that does not fit the budget or the patch size.
    """
    grids = _grids(images, patch_size, max_side)
    kept, lengths = None, grids.prod(1).tolist()
    if token_drop is not None:
        rng = np.random.default_rng(seed)
        kept = [drop_tokens(rows, columns, token_drop, rng) for rows, columns in grids.tolist()]
        lengths = [len(places) for places in kept]
    if token_budget is None:
        groups = [list(range(len(images)))] if images else []
    else:
        groups = plan_packs([n + prefix_tokens for n in lengths], token_budget, image_budget, strategy, window)
    packs = []
    device = images[0].device if images else torch.device("cpu")
    for group in groups:
        grids_S2 = grids[group].astype(np.int32)
        lengths_S = np.array([lengths[index] for index in group])
        cu_seqlens = np.concatenate([[0], lengths_S.cumsum()]).astype(np.int32)
        columns_T = grids_S2[:, 1].repeat(lengths_S)
        if kept is None:
            places_T = np.arange(cu_seqlens[-1], dtype=np.int32) - cu_seqlens[:-1].repeat(lengths_S)
        else:
            places_T = np.concatenate([kept[index] for index in group]).astype(np.int32)
        rows_T = places_T // columns_T
        coords = torch.from_numpy(np.stack([rows_T, places_T - rows_T * columns_T], 1))
        if device.type == "cuda":
            coords = coords.pin_memory()  # long enough for a copy from other memory to wait for the GPU
        packed = PackedImages(
            pixels=PixelBuffer.from_images([images[index] for index in group]),
            patches=None,
            cu_seqlens=torch.from_numpy(cu_seqlens),
            coords=coords,
            grids=torch.from_numpy(grids_S2),
            order=torch.tensor(group),
            patch_size=patch_size,
            plan=plan_pack([lengths[index] + prefix_tokens for index in group]),
            prefix_tokens=prefix_tokens,
            token_budget=token_budget,
        )
        packs.append(packed.to(device, non_blocking=True))
    return packs


def in_given_order(rows: Sequence[Tensor], packs: Sequence[PackedImages]) -> Tensor:
    """One row per image in the order of the list that was packed, from one (S, …) tensor of rows per pack."""
    order = torch.cat([packed.order for packed in packs])
    return torch.cat(list(rows))[torch.argsort(order)]


def _grids(images: Sequence[Tensor], patch_size: int, max_side: int | None) -> np.ndarray:
    """(S, 2): rows and columns of each image in patches. Looks at all images together, which is quick, and then, where
    one does not fit, for the first such one."""
    if not images:
        return np.zeros((0, 2), np.int64)
    first = images[0]
    if all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
        sizes_S3 = np.fromiter(chain.from_iterable(image.shape for image in images), np.int64).reshape(-1, 3)
        grids_S2 = sizes_S3[:, 1:] // patch_size
        fits = (grids_S2 * patch_size == sizes_S3[:, 1:]).all() and grids_S2.min() > 0
        fits = fits and (max_side is None or grids_S2.max() <= max_side)
        same = len({image.dtype for image in images}) == len({image.device for image in images}) == 1
        same = same and (sizes_S3[:, 0] == first.shape[0]).all()
        if fits and same and (first.dtype == torch.uint8 or first.dtype.is_floating_point):
            return grids_S2
    for index, image in enumerate(images):
        _refuse(f"images[{index}]", image, first, patch_size, max_side)
    raise AssertionError("none of the images was refused")


def _refuse(name: str, image: Tensor, first: Tensor, patch_size: int, max_side: int | None) -> None:
    """Raise what is wrong with an image, if anything is."""
    if not isinstance(image, Tensor) or image.dim() != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name} must be a tensor (C, H, W), got {got}")
    _, height, width = image.shape
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"{name} must have sides that are multiples of {patch_size} pixels, got {height} × {width}")
    if max_side is not None and max(height, width) > max_side * patch_size:
        expected = f"at most {max_side} patches of {patch_size} pixels per side"
        raise ValueError(f"{name} must have {expected}, got {height} × {width} pixels")
    if (image.dtype, image.shape[0], image.device) != (first.dtype, first.shape[0], first.device):
        expected = f"{first.shape[0]} channels of {first.dtype} on {first.device} as images[0]"
        raise ValueError(f"{name} must have {expected}, got {image.shape[0]} of {image.dtype} on {image.device}")
    if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
        raise ValueError(f"{name} must be uint8 or float, got {image.dtype}")


# Which images share a pack


def plan_packs(
    lengths: Sequence[int],
    token_budget: int,
    image_budget: int | None = None,
    strategy: str = "best_fit",
    window: int = 1024,
) -> list[list[int]]:
    """Group images into packs by their lengths in tokens.

    strategy: "next_fit" closes a pack at the first image that does not fit; order is kept, packs are 75–98% full.
        "best_fit" looks at the next `window` images. It opens a pack with the largest, goes on with small and large
        ones so that their mean stays that of the window, and ends with those that fill the rest best. Packs are over
        99% full where the lengths and the image budget allow it, and every pack holds small and large images.

    Returns indices into lengths, ascending inside a pack. Raises ValueError for an image over the budget, naming it.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be {' or '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    for name, value in (("token_budget", token_budget), ("image_budget", image_budget), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for index, length in enumerate(lengths):
        if not 1 <= length <= token_budget:
            raise ValueError(f"images[{index}] must have 1 to token_budget = {token_budget} tokens, got {length}")
    image_budget = image_budget or len(lengths)
    if strategy == "next_fit":
        return _next_fit(lengths, token_budget, image_budget)
    return _best_fit(lengths, token_budget, image_budget, window)


def _next_fit(lengths: Sequence[int], token_budget: int, image_budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room or len(packs[-1]) == image_budget:
            packs.append([])
            room = token_budget
        packs[-1].append(index)
        room -= length
    return packs


def _best_fit(lengths: Sequence[int], token_budget: int, image_budget: int, window: int) -> list[list[int]]:
    waiting = sorted((length, index) for index, length in enumerate(lengths[:window]))
    arriving = ((length, index) for index, length in enumerate(lengths[window:], window))
    packs = []
    while waiting:
        mean = sum(length for length, _ in waiting) / len(waiting)
        pack, room, place = [], token_budget, len(waiting) - 1
        while place >= 0:
            length, index = waiting.pop(place)
            pack.append(index)
            room -= length
            images_left = image_budget - len(pack)
            if room <= 4 * mean:
                chosen = _fullest_subset(waiting, room, slack=token_budget // 1024)
                if len(chosen) <= images_left:
                    pack += [waiting.pop(place)[1] for place in chosen]
                    break
            if not images_left or not waiting or waiting[0][0] > room:
                break
            share = min(images_left, max(1, round(room / mean)))  # images that should fill what room is left
            place = bisect_right(waiting, (room, math.inf)) - 1 if share == 1 or room > share * mean else 0
        packs.append(sorted(pack))
        for _, arrived in zip(pack, arriving, strict=False):
            insort(waiting, arrived)
    return packs


def _fullest_subset(waiting: list[tuple[int, int]], room: int, slack: int) -> list[int]:
    """Places, descending, of images in `waiting` (sorted) that leave at most `slack` of the room, or the least.

    Subset sums as bits of an integer: bit n of `sums` says that some images have n tokens together. Images are added
    from the largest down, so that small ones stay for the gaps of later packs.
    """
    sums, gained, inside = 1, [], (2 << room) - 1
    for length, _ in reversed(waiting):
        grown = sums | (sums << length & inside)
        gained.append(grown ^ sums)
        sums = grown
        if sums >> max(room - slack, 0):
            break
    total, chosen = sums.bit_length() - 1, []
    for step in reversed(range(len(gained))):
        if gained[step] >> total & 1:  # no sum that large before this image came
            place = len(waiting) - 1 - step
            chosen.append(place)
            total -= waiting[place][0]
    return chosen[::-1]


# Which tokens are kept


def kept_tokens(rows: int, columns: int, rate: float) -> int:
    """Patches of an image that stay when the share `rate` is dropped: rounded, at least one."""
    if not 0 <= rate < 1:
        raise ValueError(f"token drop rate must be in [0, 1), got {rate} for an image of {rows} × {columns} patches")
    return max(1, round(rows * columns * (1 - rate)))


def drop_tokens(rows: int, columns: int, token_drop: DropRate | None, rng: np.random.Generator) -> np.ndarray:
    """Row-major places of the patches that stay, ascending."""
    rate = token_drop(rows, columns) if callable(token_drop) else token_drop or 0.0
    keep = kept_tokens(rows, columns, rate)
    if keep == rows * columns:
        return np.arange(keep)
    return np.sort(rng.choice(rows * columns, keep, replace=False))


def beta_rate(mean: float, maximum: float, rng: np.random.Generator) -> DropRate:
    """Drop rates u · maximum with u from the Beta distribution of this mean and variance 0.3 · mean · (1 − mean).

    Source: NaViT (arXiv 2307.06304), section 3.3, as the next two.
    """
    concentration = 1 / 0.3 - 1
    return lambda rows, columns: maximum * rng.beta(concentration * mean, concentration * (1 - mean))


def resolution_rate(
    shortest: int, longest: int, low: float, high: float, rng: np.random.Generator, deviation: float = 0.02
) -> DropRate:
    """Drop rates that grow with the image: normal, cut at 2 deviations, around a mean linear in the number of patches.

    The mean is `low` at `shortest` patches and `high` at `longest`, and stays at either end beyond.
    """

    def rate(rows: int, columns: int) -> float:
        noise = rng.standard_normal()
        while abs(noise) > 2:
            noise = rng.standard_normal()
        mean = np.interp(rows * columns, (shortest, longest), (low, high))
        return float(np.clip(mean + deviation * noise, 0.0, 0.999))

    return rate


def scheduled_rate(seen: float, low: float, high: float, midpoint: float, temperature: float) -> float:
    """Drop rate after `seen` images: low + (high − low) · sigmoid((seen − midpoint) / temperature).

    A negative temperature decreases it over training, which the paper found best.
    """
    return low + (high - low) * (1 + math.tanh((seen - midpoint) / (2 * temperature))) / 2
