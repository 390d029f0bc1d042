"""One image file → pixels at the size that a NaViT should see it at.

S images, (C, H, W) channels, height and width in pixels; rows and columns count patches.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # what Pillow decodes without running other programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
MAX_PIXELS = 50_000_000  # decoding takes up to about 9 bytes a pixel
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class UnusableImage(Exception):
    """A file that holds no image we can use; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Resize:
    """How an image's size is chosen. Every kind keeps the aspect ratio, but for rounding each side to whole patches.

    kind: "native" keeps the size. "uniform" and "truncated_normal" draw a side r in [low, high] pixels and resize to r²
        pixels; low = high fixes it. "tokens" resizes, up or down, to as many patches as fit into max_tokens.
    max_tokens, max_side: no image gets more patches, or more patches a side, whatever the kind; None: no limit.

    truncated_normal is N(−0.5, 1) cut to [−1, 1] and stretched to [low, high].
    Source: NaViT (arXiv 2307.06304): uniform over [64, 256] in its main runs, truncated_normal over [64, 384] the best.
    """

    kind: str = "native"
    low: float = 64.0
    high: float = 256.0
    max_tokens: int | None = None
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("native", "uniform", "truncated_normal", "tokens"):
            raise ValueError(f"kind must be native, uniform, truncated_normal or tokens, got {self.kind!r}")
        if not 0 < self.low <= self.high:
            raise ValueError(f"sides must be 0 < low <= high, got low = {self.low}, high = {self.high}")
        if self.max_tokens is None and self.kind == "tokens":
            raise ValueError("max_tokens must be given for kind 'tokens', got None")
        for name, limit in (("max_tokens", self.max_tokens), ("max_side", self.max_side)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")

    def grid(self, height: float, width: float, patch_size: int, rng: np.random.Generator) -> tuple[int, int]:
        """(rows, columns) of patches for an image of height × width pixels."""
        max_tokens, max_side = self.max_tokens or math.inf, self.max_side or math.inf
        if self.kind != "tokens":
            scale = self._side(rng, math.sqrt(height * width)) / math.sqrt(height * width) / patch_size
            rows, columns = rounded_grid(height, width, scale)
            if rows * columns <= max_tokens and max(rows, columns) <= max_side:
                return rows, columns
        return largest_grid(height, width, max_tokens, max_side)

    def _side(self, rng: np.random.Generator, native: float) -> float:
        if self.kind == "native":
            return native
        if self.kind == "uniform":
            return rng.uniform(self.low, self.high)
        drawn = rng.normal(-0.5, 1.0)
        while abs(drawn) > 1:
            drawn = rng.normal(-0.5, 1.0)
        return self.low + (drawn + 1) / 2 * (self.high - self.low)


def rounded_grid(height: float, width: float, scale: float) -> tuple[int, int]:
    """(rows, columns): both sides times scale, rounded to whole patches, at least one."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def largest_grid(height: float, width: float, max_tokens: float, max_side: float) -> tuple[int, int]:
    """(rows, columns) at the largest scale whose rounded grid has at most that many patches in all and per side."""
    fits, exceeds = 0.0, (min(max_tokens, max_side) + 1) / max(height, width)
    for _ in range(40):  # halvings, until scales differ by less than any rounding
        middle = (fits + exceeds) / 2
        rows, columns = rounded_grid(height, width, middle)
        if rows * columns <= max_tokens and max(rows, columns) <= max_side:
            fits = middle
        else:
            exceeds = middle
    return rounded_grid(height, width, fits)


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image.

    flip: probability of a left–right flip. crop: a random part of the image is taken whose sides are each at least this
    share of its own; 1 takes all. recolor: probability that the three colour channels change places.
    """

    flip: float = 0.5
    crop: float = 1.0
    recolor: float = 0.0

    def box(self, rng: np.random.Generator) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the part that is taken, as shares of width and height."""
        width, height = rng.uniform(self.crop, 1.0, 2)
        left, top = rng.uniform(0.0, 1.0, 2) * (1 - width, 1 - height)
        return left, top, left + width, top + height

    def change(self, pixels_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.flip:
            pixels_HWC = pixels_HWC[:, ::-1]
        if rng.random() < self.recolor:
            pixels_HWC = pixels_HWC[:, :, rng.permutation(3)]
        return pixels_HWC


def load_image(
    path: str | os.PathLike[str],
    resize: Resize | None = None,
    patch_size: int = 1,
    *,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode an image file → uint8 (3, H, W), H and W multiples of patch_size.

    resize: default native. rng: draws the size and the augmentation; default seeded with 0.
    Raises UnusableImage for a file that is missing, empty, broken, truncated, 1 × 1 or over max_pixels.
    """
    rng = rng or np.random.default_rng(0)
    box = augment.box(rng) if augment else (0.0, 0.0, 1.0, 1.0)

    def size(height: int, width: int) -> tuple[int, int]:
        part = height * (box[3] - box[1]), width * (box[2] - box[0])
        rows, columns = (resize or Resize()).grid(*part, patch_size, rng)
        return rows * patch_size, columns * patch_size

    pixels_HWC = np.asarray(read_rgb(path, size, box=box, max_pixels=max_pixels))
    if augment:
        pixels_HWC = augment.change(pixels_HWC, rng)
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))


def read_rgb(
    path: str | os.PathLike[str],
    size: Callable[[int, int], tuple[int, int]],
    *,
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image file's first frame upright as 8-bit RGB, transparency on white.

    size: (height, width) upright → (height, width) to resize to. box: the part to take, in shares of width and height.
    The size that the header names is checked before a pixel is decoded; a JPEG is decoded smaller where that is enough.
    Raises UnusableImage.
    """
    try:
        if os.path.getsize(path) == 0:
            raise UnusableImage("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about sizes, which we check, and about odd metadata
            with Image.open(path, formats=FORMATS) as image:
                return _decode(image, size, box, max_pixels)
    except UnusableImage:
        raise
    except FileNotFoundError:
        raise UnusableImage("no such file") from None
    except Image.UnidentifiedImageError:
        raise UnusableImage("not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        raise UnusableImage(f"over {max_pixels / 1e6:g} megapixels") from None
    except Exception as error:  # decoders raise almost anything on broken bytes, and one file must not end a run
        raise UnusableImage(f"broken: {' '.join(str(error).split()) or type(error).__name__}") from error


def _decode(
    image: Image.Image,
    size: Callable[[int, int], tuple[int, int]],
    box: tuple[float, float, float, float],
    max_pixels: int,
) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise UnusableImage(f"{image.width} × {image.height}: over {max_pixels / 1e6:g} megapixels")
    if image.width == image.height == 1:
        raise UnusableImage("1 × 1 pixel")
    turned = image.getexif().get(0x0112) in TURNED
    height, width = (image.width, image.height) if turned else (image.height, image.width)
    to_height, to_width = size(height, width)
    reduced = math.ceil(to_width / (box[2] - box[0])), math.ceil(to_height / (box[3] - box[1]))
    image.draft(None, reduced[::-1] if turned else reduced)
    image = _eight_bit(ImageOps.exif_transpose(image))
    part = (box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height)
    image = image.resize((to_width, to_height), Image.Resampling.BICUBIC, box=part, reducing_gap=2.0)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode → RGB, or RGBA where there is transparency. 16-bit greys, which Pillow would clip, are scaled."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535)
        return Image.fromarray((grey // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnusableImage("floating-point pixels, whose range is unknown")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
