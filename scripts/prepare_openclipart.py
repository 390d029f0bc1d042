"""Prepare the drawings of Debian's package openclipart-png (public domain) as a data set with a fixed split.

    apt-get download openclipart-png
    python scripts/prepare_openclipart.py openclipart-png_*.deb clipart                      # all, as they are
    python scripts/prepare_openclipart.py openclipart-png_*.deb clipart-256 --max-side 256   # small copies, WebP
    python scripts/prepare_openclipart.py openclipart-png_*.deb data/openclipart-mini --mini # what is shipped

Writes OUT/<class>/<hash>.<suffix>, and OUT/manifest.csv with columns path, label, split (train or test), group, source
(SHA-256 of the original file). A class is a top folder of the package, of which there are 22; --mini has its own six.

- Files of the same content count once; drawings that stand in more than one top folder are dropped.
- Drawings that look alike or are numbered alike form a group, and a group is never split. Alike: brightness, shrunk to
  12 × 12, correlates by more than 0.95 at about the same aspect ratio (the same drawing recoloured, or in black and
  white). Numbered alike: names in one folder that differ in digits only. This finds most series, not all of them.
- A group is held out when its hash says so (a fifth of all): the split depends on the seed and the content alone.
- Where drawings are decoded, those over 64 megapixels, broken or 1 × 1 are left out, and named at the end.
"""

import argparse
import csv
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from navit.images import UnusableImage, read_rgb

MAX_PIXELS = 64_000_000
HELD_OUT = 0.2
MINI_SIDE, MINI_TRAIN, MINI_TEST, MINI_PER_GROUP = 128, 195, 50, 16
MINI = {  # folders with many independent drawings that a small model can tell apart; an icon theme is one style
    "animals": "animals",
    "flags": "signs_and_symbols/flags",
    "flat-icons": "computer/icons/flat-theme",
    "food": "food",
    "lemon-icons": "computer/icons/lemon-theme",
    "people": "people",
}


@dataclass
class Drawing:
    path: Path  # relative to the package's folder of PNG files
    digest: str  # SHA-256 of the file
    label: str
    group: str = ""
    split: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the .deb file, or a folder it was unpacked to")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--max-side", type=int, help="shrink drawings to sides of at most this many pixels, as WebP")
    parser.add_argument("--mini", action="store_true", help="the balanced subset that the repository ships")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists already")
    max_side = MINI_SIDE if args.mini else args.max_side
    with tempfile.TemporaryDirectory() as unpacked:
        root = find_root(args.source, Path(unpacked))
        drawings = distinct_drawings(root)
        looks, skipped = look_at_all(root, drawings)
        assign_groups(drawings, looks, args.seed)
        if max_side:
            drawings = [drawing for drawing in drawings if drawing.digest in looks]
        write(root, args.out, choose_mini(drawings, args.seed) if args.mini else drawings, max_side)
    for path, reason in skipped.items():
        print(f"not decoded: {path}: {reason}{' (left out)' if max_side else ''}")


def find_root(source: Path, scratch: Path) -> Path:
    """The package's folder of PNG files, unpacked into scratch where source is a .deb file."""
    if source.is_file():
        subprocess.run(["dpkg-deb", "-x", source, scratch], check=True)
        source = scratch
    inside = source / "usr/share/openclipart/png"
    root = inside if inside.is_dir() else source
    if not (root / "animals").is_dir():
        sys.exit(f"{source} is neither the package openclipart-png nor a folder that it was unpacked to")
    return root


def distinct_drawings(root: Path) -> list[Drawing]:
    """One drawing per content, by hash, without those that stand in more than one top folder."""
    places = defaultdict(list)
    for path in sorted(root.rglob("*.png")):
        places[hashlib.sha256(path.read_bytes()).hexdigest()].append(path.relative_to(root))
    one_folder = {digest: paths for digest, paths in places.items() if len({path.parts[0] for path in paths}) == 1}
    print(
        f"{sum(map(len, places.values()))} paths, {len(places)} contents, {len(one_folder)} of them in one folder only"
    )
    return [Drawing(paths[0], digest, paths[0].parts[0]) for digest, paths in sorted(one_folder.items())]


# Groups and split


def look_at_all(root: Path, drawings: list[Drawing]) -> tuple[dict[str, np.ndarray], dict[Path, str]]:
    """What `alike` compares, by digest, and why some drawings have none."""
    looks, skipped = {}, {}
    for drawing in drawings:
        try:
            looks[drawing.digest] = look(root / drawing.path)
        except UnusableImage as error:
            skipped[drawing.path] = str(error)
    return looks, skipped


def look(path: Path) -> np.ndarray:
    """Brightness at 12 × 12, normalized to length 1 (0 for a blank drawing), and last log(width / height)."""
    small = read_rgb(path, shrink_to(64), max_pixels=MAX_PIXELS)
    grey = np.asarray(small.resize((12, 12), Image.Resampling.BOX).convert("L"), np.float32).ravel()
    grey -= grey.mean()
    return np.append(grey / max(float(np.linalg.norm(grey)), 1e-3), np.log(small.width / small.height))


def alike(looks: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    digests, rows = list(looks), np.stack(list(looks.values()))
    for i, row in enumerate(rows):
        near = (rows[i + 1 :, :-1] @ row[:-1] > 0.95) & (abs(rows[i + 1 :, -1] - row[-1]) < 0.1)
        yield from ((digests[i], digests[i + 1 + j]) for j in np.flatnonzero(near))


def numbered_alike(drawings: list[Drawing]) -> Iterator[tuple[str, str]]:
    first: dict[tuple[Path, str], str] = {}
    for drawing in drawings:
        letters = re.sub(r"[\W\d_]+|bw|colou?r", "", drawing.path.stem.lower())
        if letters:
            yield first.setdefault((drawing.path.parent, letters), drawing.digest), drawing.digest


def assign_groups(drawings: list[Drawing], looks: dict[str, np.ndarray], seed: int) -> None:
    """Join what belongs together, name each group by its smallest digest, and hold a fifth of the groups out."""
    parent = {drawing.digest: drawing.digest for drawing in drawings}

    def top(digest: str) -> str:
        while parent[digest] != digest:
            parent[digest] = digest = parent[parent[digest]]
        return digest

    for one, other in [*alike(looks), *numbered_alike(drawings)]:
        low, high = sorted((top(one), top(other)))
        parent[high] = low
    for drawing in drawings:
        drawing.group = top(drawing.digest)
        drawing.split = "test" if shuffled(drawing.group, seed) < HELD_OUT else "train"


def shuffled(digest: str, seed: int) -> float:
    """A number in [0, 1) that looks random and depends on the digest and the seed alone."""
    return int(hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()[:12], 16) / 16**12


def choose_mini(drawings: list[Drawing], seed: int) -> list[Drawing]:
    """As many drawings of each class of MINI for each split, at most MINI_PER_GROUP of a group, in shuffled order."""
    chosen = []
    for label, folder in MINI.items():
        inside = [drawing for drawing in drawings if drawing.path.is_relative_to(folder)]
        of_group: Counter[str] = Counter()
        wanted = {"train": MINI_TRAIN, "test": MINI_TEST}
        for drawing in sorted(inside, key=lambda drawing: shuffled(drawing.digest, seed)):
            of_group[drawing.group] += 1
            if wanted[drawing.split] and of_group[drawing.group] <= MINI_PER_GROUP:
                wanted[drawing.split] -= 1
                chosen.append(Drawing(drawing.path, drawing.digest, label, drawing.group, drawing.split))
        if any(wanted.values()):
            sys.exit(f"{label}: too few drawings, {wanted} more are needed")
    return chosen


# Files


def shrink_to(side: int) -> Callable[[int, int], tuple[int, int]]:
    def size(height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    return size


def write(root: Path, out: Path, drawings: list[Drawing], max_side: int | None) -> None:
    out.mkdir(parents=True)
    lines = []
    for drawing in sorted(drawings, key=lambda drawing: (drawing.label, drawing.digest)):
        target = out / drawing.label / f"{drawing.digest[:12]}.{'webp' if max_side else 'png'}"
        target.parent.mkdir(exist_ok=True)
        if max_side:
            read_rgb(root / drawing.path, shrink_to(max_side), max_pixels=MAX_PIXELS).save(target, quality=90, method=6)
        else:
            shutil.copyfile(root / drawing.path, target)
        relative = target.relative_to(out).as_posix()
        lines.append((relative, drawing.label, drawing.split, drawing.group[:12], drawing.digest))
    with open(out / "manifest.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label", "split", "group", "source"), *lines])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {len(lines)} drawings, {size / 1e6:.2f} MB; {dict(Counter(line[2] for line in lines))}")


if __name__ == "__main__":
    main()
