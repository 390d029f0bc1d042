"""Labelled image files → packs: which files there are, and the loader that decodes, resizes and packs them.

S images in a pack. Decoding one file is navit/images.py; packing is navit/packing.py.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from navit.images import MAX_PIXELS, SUFFIXES, Augment, Resize, UnusableImage, load_image
from navit.packing import DropRate, PackedImages, pack

MANIFESTS = ("manifest.csv", "manifest.jsonl")
CHUNK = 16  # images that a worker decodes before it hands them over


class DataError(ValueError):
    """A data set that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class ImageSet:
    """Image files with labels; labels index classes. splits: the manifest's word for each image ("" without one)."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, keep: Sequence[bool]) -> ImageSet:
        """The images where keep is true, with all classes."""
        places = [place for place, kept in enumerate(keep) if kept]
        parts = {name: tuple(getattr(self, name)[i] for i in places) for name in ("paths", "labels")}
        return replace(self, **parts, splits=tuple(self.splits[i] for i in places) if self.splits else ())

    def majority_share(self) -> float:
        """Accuracy of always answering the most frequent class."""
        return max(np.bincount(self.labels)) / len(self) if len(self) else 0.0


@dataclass
class SkipReport:
    """Files that were left out, and why."""

    reasons: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        lines = [f"{len(self)} {'file' if len(self) == 1 else 'files'} skipped"]
        return "\n".join(lines + [f"  {path}: {reason}" for path, reason in sorted(self.reasons.items())])


# Which files there are


def read_images(path: str | os.PathLike[str]) -> ImageSet:
    """Read a data set: a CSV or JSONL manifest, a folder that has one, or a folder of class folders.

    A manifest has path (relative to its folder, or absolute) and label for each image, and may have split (train for
    training, any other word for held-out). Named manifest.csv or manifest.jsonl, it is found inside a folder.
    In class folders, images are found at any depth by their suffix; hidden files and folders are passed over.
    Raises DataError where there is nothing to classify: no such path, no images, or fewer than two classes.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        manifest = next((path / name for name in MANIFESTS if (path / name).is_file()), None)
        rows = _read_folder(path) if manifest is None else _read_manifest(manifest)
    else:
        rows = _read_manifest(path)
    if not rows:
        raise DataError(f"{path}: no images ({'class folders with ' if path.is_dir() else ''}{', '.join(SUFFIXES)})")
    names = {label for _, label, _ in rows}
    classes = sorted(names, key=(lambda name: int(name)) if all(name.isdecimal() for name in names) else None)
    if len(classes) < 2:
        raise DataError(f"{path}: one class only ({classes[0]}); at least two are needed")
    places = {name: place for place, name in enumerate(classes)}
    paths, labels, splits = zip(*((file, places[label], split) for file, label, split in rows), strict=True)
    return ImageSet(paths, labels, tuple(classes), splits if any(splits) else ())


def train_and_held_out(images: ImageSet, held_out: float = 0.2, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split as the manifest says, or, where it says nothing, hold this share of each class out.

    The drawn split depends on the seed and on the last two parts of each path, so it stays when a folder moves.
    Raises DataError when a side is empty.
    """
    if images.splits:
        train = [split == "train" for split in images.splits]
    else:
        train = [True] * len(images)
        for label in range(len(images.classes)):
            places = [place for place, other in enumerate(images.labels) if other == label]
            places.sort(key=lambda place: _shuffled("/".join(Path(images.paths[place]).parts[-2:]), seed))
            for place in places[: round(held_out * len(places))]:
                train[place] = False
    sides = images.select(train), images.select([not kept for kept in train])
    for name, side in zip(("training", "held-out"), sides, strict=True):
        if not len(side):
            raise DataError(f"no {name} images: all {len(images)} are on the other side of the split")
    return sides


def find_images(paths: Sequence[str | os.PathLike[str]]) -> ImageSet:
    """Image files without labels (all 0, no classes): the files named, and those in the folders named, at any depth.

    Raises DataError for a path that does not exist and where there is no image.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found += _images_below(path) if path.is_dir() else [str(path)]
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no images ({', '.join(SUFFIXES)})")
    return ImageSet(tuple(found), (0,) * len(found), ())


def _images_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in names]
    return found


def _read_folder(root: Path) -> list[tuple[str, str, str]]:
    """(path, label, split) of each image below a folder of class folders."""
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [(path, folder.name, "") for folder in classes for path in _images_below(folder)]


def _read_manifest(path: Path) -> list[tuple[str, str, str]]:
    """(path, label, split) of each line of a manifest."""
    if path.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{path}: a manifest must end in .csv or .jsonl")
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
            for number, line in enumerate(lines, 1):
                if not isinstance(line, dict) or line.get("path") in (None, "") or line.get("label") in (None, ""):
                    raise DataError(f"{path}: image {number} has no path or no label")
                split = line.get("split")
                rows.append(
                    (str(path.parent / str(line["path"])), str(line["label"]), "" if split is None else str(split))
                )
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{path}: image {len(rows) + 1} cannot be read: {error}") from None
    return rows


def _shuffled(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


# Loading


class _Decoded(Dataset[tuple[int, "np.ndarray | str"]]):
    """place → (place, uint8 pixels (3, H, W), or why there are none). Runs in worker processes.

    Everything random comes from (seed, epoch, place), never from the worker.
    """

    def __init__(
        self,
        images: ImageSet,
        patch_size: int,
        resize: Resize,
        augment: Augment | None,
        seed: int,
        epoch: int,
        max_pixels: int,
    ) -> None:
        self.images, self.patch_size, self.resize, self.augment = images, patch_size, resize, augment
        self.seed, self.epoch, self.max_pixels = seed, epoch, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | str]:
        rng = np.random.default_rng((self.seed, self.epoch, place))
        path = self.images.paths[place]
        try:
            image = load_image(
                path, self.resize, self.patch_size, augment=self.augment, rng=rng, max_pixels=self.max_pixels
            )
        except UnusableImage as reason:
            return place, str(reason)
        return place, image.numpy()  # an array travels by value; a tensor would keep a file descriptor open


def batches(
    images: ImageSet,
    *,
    token_budget: int,
    patch_size: int,
    resize: Resize | None = None,
    augment: Augment | None = None,
    token_drop: DropRate | None = None,
    prefix_tokens: int = 0,
    max_side: int | None = None,
    image_budget: int | None = None,
    strategy: str = "best_fit",
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    window: int = 8,
    max_pixels: int = MAX_PIXELS,
    report: SkipReport | None = None,
) -> Iterator[tuple[PackedImages, Tensor]]:
    """One epoch of (pack, labels): every usable image once. A pack's `order` holds its images' places in the set, and
    labels (int64 (S,)) are in the same order.

    patch_size, prefix_tokens, max_side: what the loader must know of the model, `NaViTConfig.pack_options`.
    resize: default native; an image that would have over max_side patches a side or not fit the budget is shrunk.
    token_budget, token_drop, image_budget, strategy: see `navit.packing.pack`.
    shuffle: draw the order of the images, and of the packs; else images come in the set's order, as packing allows.
    workers: processes that decode; 0 decodes here. The batches are the same, bit for bit, for any number.
    window: how many packs' worth of images are packed at a time; more fill packs better and wait longer.
    report: takes the files that are skipped.

    The same seed and epoch give the same batches: to resume, skip as many as were seen.
    """
    resize, room = resize or Resize(), token_budget - prefix_tokens
    resize = replace(resize, max_tokens=min(resize.max_tokens or room, room), max_side=resize.max_side or max_side)
    decoded = _Decoded(images, patch_size, resize, augment, seed, epoch, max_pixels)
    order = np.random.default_rng((seed, epoch)).permutation(len(images)) if shuffle else np.arange(len(images))
    loader = DataLoader(
        decoded,
        batch_size=CHUNK,
        sampler=order.tolist(),
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # a loader draws a number even if nobody needs it: not from the global one
    )
    labels = torch.tensor(images.labels)
    waiting: list[tuple[int, Tensor]] = []  # decoded, not yet in a pack that left
    arrived = packed_windows = 0  # tokens since the last packing

    def pack_waiting(last: bool) -> Iterator[tuple[PackedImages, Tensor]]:
        """Pack what waits; until the last time, the emptiest pack's images wait on."""
        nonlocal waiting
        rng = np.random.default_rng((seed, epoch, len(images), packed_windows))
        packs = pack(
            [image for _, image in waiting],
            token_budget,
            patch_size=patch_size,
            image_budget=image_budget,
            strategy=strategy,
            token_drop=token_drop,
            prefix_tokens=prefix_tokens,
            seed=rng,
        )
        emptiest = None if last else min(range(len(packs)), key=lambda number: packs[number].fill)
        places = torch.tensor([place for place, _ in waiting])
        for number in rng.permutation(len(packs)) if shuffle else range(len(packs)):
            if number != emptiest:
                mine = places[packs[number].order]
                yield replace(packs[number], order=mine), labels[mine]
        waiting = [] if emptiest is None else [waiting[i] for i in packs[emptiest].order.tolist()]

    for chunk in loader:
        for place, pixels in chunk:
            if isinstance(pixels, str):
                if report is not None:
                    report.reasons[images.paths[place]] = pixels
                continue
            waiting.append((place, torch.from_numpy(pixels)))
            arrived += pixels[0].size // patch_size**2 + prefix_tokens
        if arrived >= window * token_budget:
            yield from pack_waiting(last=False)
            arrived, packed_windows = 0, packed_windows + 1
    if waiting:
        yield from pack_waiting(last=True)
