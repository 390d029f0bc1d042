"""What patchify takes: images of any sizes in one flat buffer, and which of their patches are kept.

T tokens (kept patches), S images, N pixel values of all images together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .._checks import fail
from ..plan import int64_tensor


@dataclass(frozen=True)
class PixelBuffer:
    """Images of any sizes, one after another without gaps, each laid out (C, H, W): one copy moves them all.

    pixels: (N,) uint8 or float. offsets_S: (S,) int64, where each image starts in pixels. sizes_S2: (S, 2) int32,
    (height, width) in pixels. channels: C, the same for all images.

    Example: an image (3, 32, 16) followed by one of (3, 16, 16) gives pixels (2304,), offsets_S (0, 1536),
    sizes_S2 ((32, 16), (16, 16)), channels 3.
    """

    pixels: Tensor
    offsets_S: Tensor
    sizes_S2: Tensor
    channels: int

    @classmethod
    def from_images(cls, images: Sequence[Tensor], pin_memory: bool = False) -> PixelBuffer:
        """Lay out (C, H, W) tensors of one dtype, device and channel count.

        pin_memory: put a CPU buffer in page-locked memory, from where `.to("cuda")` copies without waiting.
        """
        sizes_S3 = _sizes(images)
        counts, sizes_S2, first = sizes_S3.prod(1), sizes_S3[:, 1:].to(torch.int32), images[0]
        offsets_S = counts.cumsum(0) - counts
        if pin_memory and first.device.type == "cpu":
            pixels = torch.empty(int(counts.sum()), dtype=first.dtype, pin_memory=True)
            torch.cat([image.reshape(-1) for image in images], out=pixels)
            offsets_S, sizes_S2 = offsets_S.pin_memory(), sizes_S2.pin_memory()
        else:
            pixels = torch._utils._flatten_dense_tensors(images)
        return cls(pixels, offsets_S, sizes_S2, first.shape[0]).to(first.device)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PixelBuffer:
        """The same images on another device."""
        moved = [t.to(device, non_blocking=non_blocking) for t in (self.pixels, self.offsets_S, self.sizes_S2)]
        return PixelBuffer(moved[0], moved[1], moved[2], self.channels)

    def pin_memory(self) -> PixelBuffer:
        """The same images in page-locked memory, from where `.to("cuda")` copies without waiting."""
        return PixelBuffer(
            self.pixels.pin_memory(), self.offsets_S.pin_memory(), self.sizes_S2.pin_memory(), self.channels
        )


def _sizes(images: Sequence[Tensor]) -> Tensor:
    """(S, 3): channels, heights, widths. Looks at all images together, which is quick, and then, where one is not like
    the first one, for it."""
    if len(images) == 0:
        fail("images", "at least one image", "none")
    if all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
        sizes_S3 = int64_tensor(chain.from_iterable(image.shape for image in images)).view(-1, 3)
        same = len({image.dtype for image in images}) == len({image.device for image in images}) == 1
        if same and bool((sizes_S3[:, 0] == sizes_S3[0, 0]).all()):
            return sizes_S3
    first = images[0]
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dim() != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            fail(f"images[{index}]", "a tensor (C, H, W)", got)
        if (image.shape[0], image.dtype, image.device) != (first.shape[0], first.dtype, first.device):
            wanted = f"like images[0]: {first.shape[0]} channels, {first.dtype}, {first.device}"
            fail(f"images[{index}]", wanted, f"{image.shape[0]} channels, {image.dtype}, {image.device}")
    raise AssertionError("no image differs")


@dataclass(frozen=True)
class KeptPatches:
    """Which patches of which images are kept, in the order in which they are packed.

    cu_seqlens: (S + 1,) int32; image s owns the tokens cu_seqlens[s] : cu_seqlens[s + 1].
    coords_T2: (T, 2) int32, (row, column) of each token's patch in its image's grid of patches; no patch twice.

    Example: of a first image the patches (0, 1) and (2, 0), of a second one (0, 0): cu_seqlens (0, 2, 3),
    coords_T2 ((0, 1), (2, 0), (0, 0)).
    """

    cu_seqlens: Tensor
    coords_T2: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> KeptPatches:
        """The same patches, described on another device."""
        return KeptPatches(
            self.cu_seqlens.to(device, non_blocking=non_blocking), self.coords_T2.to(device, non_blocking=non_blocking)
        )
