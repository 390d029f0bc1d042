"""Data sets and batches are what they say they are; so are the shipped images and the script that made them."""

import csv
import hashlib
import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from navit.data import DataError, ImageSet, SkipReport, batches, find_images, read_images, train_and_held_out
from navit.images import Augment, Resize, load_image

SHIPPED = Path(__file__).parent.parent / "data" / "openclipart-mini"


# Data sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 30 images of all sizes, some files that are none, and one image of a third class."""
    rng = np.random.default_rng(0)
    for number in range(60):
        path = tmp_path / ("cats" if number % 2 else "dogs/large") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(9, 100, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    (tmp_path / "cats" / "empty.png").write_bytes(b"")
    (tmp_path / "cats" / "text.png").write_text("not an image")
    (tmp_path / "cats" / "notes.txt").write_text("not an image, and not named like one")
    (tmp_path / "cats" / ".hidden.png").write_text("")
    (tmp_path / "dogs" / "tiny.JPG").write_bytes(b"\xff\xd8\xff")
    return tmp_path


def test_class_folders_are_read_at_any_depth(folder: Path) -> None:
    images = read_images(folder)
    assert images.classes == ("cats", "dogs")
    assert Counter(images.labels) == {0: 32, 1: 31}
    assert images.majority_share() == 32 / 63
    assert find_images([folder / "cats", folder / "dogs" / "tiny.JPG"]).paths[-1].endswith("tiny.JPG")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_manifest_gives_paths_labels_and_split(folder: Path, suffix: str) -> None:
    rows = [
        {"path": f"cats/{n}.png", "label": n % 3 * 5, "split": "train" if n < 40 else "test"} for n in range(1, 60, 2)
    ]
    with open(folder / f"manifest.{suffix}", "w", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, ["path", "label", "split"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n\n".join(map(json.dumps, rows)))
    for source in (folder, folder / f"manifest.{suffix}"):
        images = read_images(source)
        assert images.classes == ("0", "5", "10")  # numbers in the order of numbers
        train, held_out = train_and_held_out(images)
        assert (len(train), len(held_out)) == (20, 10)
        assert Path(held_out.paths[0]) == folder / "cats" / "41.png"
        assert images.classes == train.classes == held_out.classes


def test_a_drawn_split_is_stratified_and_stays_when_the_folder_moves(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def names(images: ImageSet) -> set[str]:
        return {Path(path).name for path in images.paths}

    train, held_out = train_and_held_out(read_images(folder), 0.25, seed=3)
    assert not set(train.paths) & set(held_out.paths)
    assert len(train) + len(held_out) == 63
    assert Counter(held_out.labels) == {0: 8, 1: 8}
    moved = folder.rename(tmp_path_factory.mktemp("elsewhere") / "data")
    assert names(train_and_held_out(read_images(moved), 0.25, seed=3)[1]) == names(held_out)
    assert names(train_and_held_out(read_images(moved), 0.25, seed=4)[1]) != names(held_out)


def test_data_sets_that_cannot_be_used_say_so_in_one_line(tmp_path: Path) -> None:
    def message(content: str | None, name: str = "manifest.csv") -> str:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError) as caught:
            read_images(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert "no such file" in message(None, "absent")
    assert "no images" in message("")
    assert "no images" in message("path,label\n")
    assert "image 1 has no path or no label" in message("file,class\na.png,cat\n")
    assert "image 2 has no path or no label" in message("path,label\na.png,cat\nb.png\n")
    assert "image 2 cannot be read" in message('{"path": "a.png", "label": "cat"}\n{oops\n', "manifest.jsonl")
    assert "image 1 has no path" in message("[1, 2]\n", "manifest.jsonl")
    assert "one class only (cat)" in message("path,label\na.png,cat\nb.png,cat\n")
    assert "must end in" in message("path label", "manifest.txt")
    (tmp_path / "one" / "cats").mkdir(parents=True)
    assert "no images" in message(None, "one")
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "cats" / "a.png")
    assert "one class only (cats)" in message(None, "one")
    with pytest.raises(DataError, match="no images"):
        find_images([tmp_path / "one" / "cats" / ".."][:0])
    with pytest.raises(DataError, match="no such file"):
        find_images([tmp_path / "absent"])
    (tmp_path / "test.csv").write_text("path,label,split\na.png,cat,test\nb.png,dog,test\n")
    with pytest.raises(DataError, match="no training images"):
        train_and_held_out(read_images(tmp_path / "test.csv"))


# Batches


def everything(images: ImageSet, **options: object) -> list[tuple[torch.Tensor, ...]]:
    settled = {
        "token_budget": 128,
        "patch_size": 8,
        "resize": Resize("uniform", 16, 64),
        "augment": Augment(0.5, 0.7, 0.5),
    }
    return [
        (packed.pixels.pixels, packed.cu_seqlens, packed.coords, packed.grids, packed.order, labels)
        for packed, labels in batches(images, **{**settled, "token_drop": 0.3, "window": 2, "seed": 5, **options})
    ]


def same(a: list[tuple[torch.Tensor, ...]], b: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def test_batches_are_the_same_bit_for_bit_with_any_number_of_workers(folder: Path) -> None:
    images = read_images(folder)
    reports = [SkipReport(), SkipReport()]
    alone, shared = (everything(images, workers=n, report=report) for n, report in zip((0, 2), reports, strict=True))
    assert same(alone, shared)
    assert reports[0] == reports[1]


def test_seed_and_epoch_decide_the_batches_and_leave_torch_random_numbers_alone(folder: Path) -> None:
    images, state = read_images(folder), torch.get_rng_state()
    first = everything(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, everything(images))
    assert not same(first, everything(images, epoch=1))
    assert not same(first, everything(images, seed=6))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_usable_image_once_with_its_label(folder: Path, shuffle: bool) -> None:
    images, report = read_images(folder), SkipReport()
    found: Counter[int] = Counter()
    for packed, labels in batches(images, token_budget=160, patch_size=8, window=3, shuffle=shuffle, report=report):
        assert packed.tokens <= 160
        assert labels.tolist() == [images.labels[place] for place in packed.order.tolist()]
        found.update(packed.order.tolist())
    assert set(found.values()) == {1}
    assert len(found) == 60
    assert sorted(Path(path).name for path in report.reasons) == ["empty.png", "text.png", "tiny.JPG"]
    assert str(report).startswith("3 files skipped\n")
    assert "empty.png: empty file" in str(report)
    assert {images.paths[place] for place in found}.isdisjoint(report.reasons)


def test_packs_are_full_but_for_the_last(folder: Path) -> None:
    packs = [packed for packed, _ in batches(read_images(folder), token_budget=256, patch_size=8, window=8)]
    assert np.mean([packed.fill for packed in packs[:-1]]) > 0.97


def test_an_image_larger_than_a_pack_is_shrunk_to_fit(tmp_path: Path) -> None:
    Image.new("RGB", (640, 320)).save(tmp_path / "large.png")
    images = find_images([tmp_path])
    ((packed, _),) = batches(images, token_budget=50, prefix_tokens=2, patch_size=16)
    assert packed.grids.tolist() == [[5, 9]]  # 6 × 10 is the next
    ((packed, _),) = batches(images, token_budget=50, max_side=8, patch_size=16)
    assert packed.grids.tolist() == [[4, 8]]


def test_nothing_usable_gives_no_batches(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    report = SkipReport()
    assert not list(batches(find_images([tmp_path]), token_budget=64, patch_size=16, report=report))
    assert len(report) == 1


# The shipped images


def shipped_rows() -> list[dict[str, str]]:
    with open(SHIPPED / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_shipped_images_are_balanced_few_megabytes_and_licensed() -> None:
    train, held_out = train_and_held_out(read_images(SHIPPED))
    assert 6 <= len(train.classes) <= 10
    assert len(set(Counter(train.labels).values())) == len(set(Counter(held_out.labels).values())) == 1
    assert len(held_out) >= 200
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 4_000_000
    assert "Public domain" in (SHIPPED / "README.md").read_text()


def test_shipped_split_shares_no_content_and_no_group() -> None:
    sides_of = defaultdict(set)
    for row in shipped_rows():
        content = hashlib.sha256((SHIPPED / row["path"]).read_bytes()).hexdigest()
        for known in (content, row["group"], row["source"]):
            sides_of[known].add(row["split"])
    assert all(len(found) == 1 for found in sides_of.values())


def test_shipped_images_all_decode() -> None:
    report = SkipReport()
    count = 0
    for packed, _ in batches(read_images(SHIPPED), token_budget=8192, patch_size=8, report=report):
        count += len(packed)
    assert count == len(shipped_rows())
    assert not report


# The script


def test_prepare_openclipart_splits_by_content_and_keeps_series_together(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "scripts" / "prepare_openclipart.py"
    spec = importlib.util.spec_from_file_location("prepare_openclipart", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rng = np.random.default_rng(0)
    package = tmp_path / "package"

    def draw(name: str, pixels: np.ndarray | None = None) -> np.ndarray:
        pixels = rng.integers(0, 256, (13, 17, 3), np.uint8) if pixels is None else pixels
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(package / name)
        return pixels

    for number in range(20):
        draw(f"animals/beast{'abcdefghijklmnopqrst'[number]}.png")
        draw(f"food/meal{number:02}.png")
    both = draw("animals/chicken.png")
    draw("food/roast.png", both)
    twin = draw("animals/cat.png")
    draw("animals/cats/copy.png", twin)
    draw("animals/dark_cat.png", twin // 2)
    drawings = script.distinct_drawings(package)
    assert len(drawings) == 42  # a copy counts once; what stands in both folders is dropped
    looks, skipped = script.look_at_all(package, drawings)
    script.assign_groups(drawings, looks, seed=0)
    assert not skipped
    groups = {drawing.path.stem: drawing.group for drawing in drawings}
    assert groups["cat"] == groups["dark_cat"]
    assert len({group for name, group in groups.items() if name.startswith("meal")}) == 1
    assert len({group for name, group in groups.items() if name.startswith("beast")}) == 20
    split_of = {drawing.group: drawing.split for drawing in drawings}
    assert all(drawing.split == split_of[drawing.group] for drawing in drawings)
    assert set(split_of.values()) == {"train", "test"}
    script.write(package, tmp_path / "out", drawings, max_side=8)
    written = read_images(tmp_path / "out")
    assert written.classes == ("animals", "food")
    assert len(written) == 42
    assert max(max(load_image(path).shape) for path in written.paths) == 8
