"""Image files of every kind become the right pixels, at the size that was asked for, or tell why not."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from navit.images import Augment, Resize, UnusableImage, load_image

sides = st.integers(1, 3000)


def halves(
    mode: str = "RGB", size: tuple[int, int] = (64, 32), left: object = "red", right: object = "blue"
) -> Image.Image:
    """An image whose left and right halves differ; size is (width, height)."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def corners(path: Path) -> list[list[int]]:
    """Colours of the four corners: top left, top right, bottom left, bottom right."""
    pixels = load_image(path)
    return [pixels[:, y, x].tolist() for y in (0, -1) for x in (0, -1)]


def near(got: list[int], expected: tuple[int, int, int], by: int = 6) -> bool:
    return max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= by


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that promises a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def reason(path: Path, **options: int) -> str:
    with pytest.raises(UnusableImage) as caught:
        load_image(path, **options)
    return str(caught.value)


# Decoding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 24, 16))  # top left
    upright.paste("blue", (24, 0, 48, 16))  # top right
    stored = {  # how a camera that is held so stores the upright picture
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright if stored is None else upright.transpose(stored)
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    assert load_image(tmp_path / "turned.jpg").shape == (3, 32, 48)
    found = corners(tmp_path / "turned.jpg")
    assert near(found[0], (254, 0, 0))
    assert near(found[1], (0, 0, 254))
    assert near(found[2], (255, 255, 255))


def test_a_turned_jpeg_that_is_decoded_small_keeps_its_aspect_ratio(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    halves(size=(1600, 400)).save(tmp_path / "tall.jpg", exif=exif)
    pixels = load_image(tmp_path / "tall.jpg", Resize("uniform", 80, 80), 8)
    assert pixels.shape == (3, 160, 40)
    assert near(pixels[:, 0, 20].tolist(), (254, 0, 0))
    assert near(pixels[:, -1, 20].tolist(), (0, 0, 254))


def test_grey_and_bilevel_and_palette_become_rgb(tmp_path: Path) -> None:
    halves("L", left=10, right=200).save(tmp_path / "grey.png")
    assert corners(tmp_path / "grey.png")[:2] == [[10] * 3, [200] * 3]
    halves("1", left=0, right=1).save(tmp_path / "bilevel.png")
    assert corners(tmp_path / "bilevel.png")[:2] == [[0] * 3, [255] * 3]
    halves().quantize(4).save(tmp_path / "palette.png")
    assert corners(tmp_path / "palette.png")[:2] == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.full((32, 64), 0x1000, np.uint16)
    grey[:, 32:] = 0xFF00
    Image.fromarray(grey).save(tmp_path / f"deep.{suffix}")
    assert corners(tmp_path / f"deep.{suffix}")[:2] == [[0x10] * 3, [0xFF] * 3]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    halves().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    found = corners(tmp_path / "print.jpg")
    assert near(found[0], (255, 0, 0), by=12)
    assert near(found[1], (0, 0, 255), by=12)


def test_transparency_becomes_white_in_every_mode(tmp_path: Path) -> None:
    halves("RGBA", left=(255, 0, 0, 0), right=(0, 0, 0, 255)).save(tmp_path / "rgba.png")
    halves("RGBA", left=(255, 0, 0, 0), right=(0, 0, 0, 255)).save(tmp_path / "rgba.webp", lossless=True)
    halves("LA", left=(90, 0), right=(0, 255)).save(tmp_path / "la.png")
    palette = halves("P", left=0, right=1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "palette.gif", transparency=0)
    halves("RGB", left=(9, 9, 9), right="black").save(tmp_path / "key.png", transparency=(9, 9, 9))
    for path in tmp_path.iterdir():
        assert corners(path)[:2] == [[255] * 3, [0] * 3], path.name


def test_half_transparent_black_is_grey_also_when_resized(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert near(
        load_image(tmp_path / "half.png", Resize("uniform", 16, 16), 8)[:, 4, 4].tolist(), (127, 127, 127), by=1
    )


def test_unusable_files_tell_why(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(whole, "JPEG")
    files = {
        "empty.png": (b"", "empty file"),
        "text.png": (b"this is not an image", "not an image"),
        "truncated.jpg": (whole.getvalue()[:-2000], "truncated"),
        "header.png": (png_of_size(64, 64)[:20], "broken|not an image"),
        "hollow.png": (png_of_size(64, 64), "broken"),
        "bomb.png": (png_of_size(60_000, 60_000), "over 50 megapixels"),
        "large.png": (png_of_size(10_000, 10_000), "10000 × 10000: over 50 megapixels"),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        got = reason(tmp_path / name)
        assert any(part in got for part in expected.split("|")), f"{name}: {got}"
        assert "\n" not in got
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert reason(tmp_path / "dot.png") == "1 × 1 pixel"
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    assert "floating-point" in reason(tmp_path / "float.tif")
    assert reason(tmp_path / "absent.png") == "no such file"
    (tmp_path / "folder.png").mkdir()
    assert reason(tmp_path / "folder.png")


def test_the_pixel_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png", max_pixels=5000).shape == (3, 50, 100)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert "100 × 50" in reason(tmp_path / "image.png", max_pixels=4999)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_never_does_more_than_skip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any bytes changed or cut off: an image of the right shape, or UnusableImage."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    file = io.BytesIO()
    halves().save(file, kind)
    content = bytearray(file.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "image"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        pixels = load_image(path, Resize("tokens", max_tokens=4), 8, max_pixels=10_000)
    except UnusableImage:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
    assert 1 <= pixels[0].numel() <= 4 * 64


# Sizes


@given(sides, sides, st.sampled_from([8, 14, 16, 32]), st.floats(32, 512))
def test_a_side_gives_its_area_at_the_same_aspect_ratio_within_half_a_patch(
    h: int, w: int, patch: int, side: float
) -> None:
    rows, columns = Resize("uniform", side, side).grid(h, w, patch, np.random.default_rng(0))
    for count, exact in ((rows, side * (h / w) ** 0.5 / patch), (columns, side * (w / h) ** 0.5 / patch)):
        assert count == 1 if exact < 0.5 else abs(count - exact) <= 0.5 + 1e-9


@given(sides, sides, st.integers(1, 4096))
def test_a_token_budget_is_kept_and_used(h: int, w: int, budget: int) -> None:
    rows, columns = Resize("tokens", max_tokens=budget).grid(h, w, 16, np.random.default_rng(0))
    assert budget - rows - columns <= rows * columns <= budget  # one row and one column more are too many
    scales = [((count - 0.5) / side * (count > 1), (count + 0.5) / side) for count, side in ((rows, h), (columns, w))]
    assert max(low for low, _ in scales) <= min(high for _, high in scales) * (1 + 1e-9)  # both rounded at one scale


@given(sides, sides, st.integers(1, 300), st.integers(1, 64))
def test_limits_shrink_large_images_only(h: int, w: int, max_tokens: int, max_side: int) -> None:
    rng = np.random.default_rng(0)
    free, bound = (
        Resize(**limits).grid(h, w, 16, rng) for limits in ({}, {"max_tokens": max_tokens, "max_side": max_side})
    )
    assert free == (max(1, round(h / 16)), max(1, round(w / 16)))
    if max(free) <= max_side and free[0] * free[1] <= max_tokens:
        assert bound == free
    assert bound[0] * bound[1] <= max_tokens
    assert max(bound) <= max_side


def test_sampled_sides_follow_the_paper() -> None:
    rng = np.random.default_rng(0)
    uniform = np.array([Resize("uniform", 64, 256)._side(rng, 0) for _ in range(20_000)])
    normal = np.array([Resize("truncated_normal", 64, 384)._side(rng, 0) for _ in range(20_000)])
    assert 64 <= uniform.min() < 66
    assert 254 < uniform.max() <= 256
    assert abs(uniform.mean() - 160) < 2
    assert 64 <= normal.min() < 66
    assert 380 < normal.max() <= 384
    # mean of N(−0.5, 1) cut to [−1, 1]: −0.5 + (φ(−0.5) − φ(1.5)) / (Φ(1.5) − Φ(−0.5)) = −0.1434
    assert abs(normal.mean() - (64 + (1 - 0.1434) / 2 * 320)) < 3


@pytest.mark.parametrize(
    "wrong", [{"kind": "square"}, {"low": 0.0}, {"low": 300.0}, {"kind": "tokens"}, {"max_tokens": 0}, {"max_side": 0}]
)
def test_impossible_sizes_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Resize(**wrong)


def test_augmentation_crops_flips_and_recolors(tmp_path: Path) -> None:
    halves().save(tmp_path / "image.png")
    flipped = load_image(tmp_path / "image.png", augment=Augment(flip=1.0))
    assert flipped[:, 0, 0].tolist() == [0, 0, 255]
    assert torch.equal(
        load_image(tmp_path / "image.png", augment=Augment(flip=0.0)), load_image(tmp_path / "image.png")
    )
    shapes, colours = set(), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pixels = load_image(tmp_path / "image.png", augment=Augment(0.0, crop=0.5, recolor=1.0), rng=rng)
        shapes.add(tuple(pixels.shape))
        colours.add(tuple(pixels[:, 0, 0].tolist()))
    assert all(16 <= h <= 32 and 32 <= w <= 64 for _, h, w in shapes)
    assert len(shapes) > 10
    assert colours >= {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
