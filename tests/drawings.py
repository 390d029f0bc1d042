"""A small labelled data set on disk that a small model learns at once: one colour per class, any sizes."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (220, 40, 40)}


def write_drawings(root: Path, per_class: int = 8, classes: tuple[str, ...] = tuple(COLORS), seed: int = 0) -> Path:
    """Write root/<class>/<number>.png, sides of 17 to 64 pixels."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            height, width = rng.integers(17, 65, 2)
            pixels = rng.normal(COLORS[name], 25, (height, width, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
