"""The pictures of a run folder. Every function takes plain arrays and writes one PNG.

Shapes: T tokens, S images, K classes. Pictures are uint8 arrays (height, width, 3).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, GREY, RIGHT, WRONG, ACCENT = "#222222", "#9a9a9a", "#2a8f57", "#c8452f", "#2f6fb5"
OWNERS = [matplotlib.colormaps["tab20"](k) for k in (*range(0, 20, 2), *range(1, 20, 2))]  # neighbours differ clearly


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, facecolor="white")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_predictions(
    path: Path,
    pictures: Sequence[np.ndarray],
    truths: Sequence[int],
    probabilities_SK: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Draw pictures at their own aspect ratios, all at one scale, each over its three likeliest classes.

    The true class is green; a likeliest class that is wrong is red.
    """
    columns = min(6, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    cell, bars, header = 1.9, 0.72, 0.5  # inches
    width, height = columns * (cell + 0.25) + 0.25, rows * (cell + bars + 0.25) + header
    figure = Figure(figsize=(width, height))
    correct = sum(int(p.argmax()) == t for p, t in zip(probabilities_SK, truths, strict=True))
    title = f"Held-out images at their own aspect ratios: {correct} of these {len(pictures)} are right"
    figure.text(0.25 / width, 1 - 0.3 / height, title, fontsize=12, color=INK, va="center")
    longest = max(max(picture.shape[:2]) for picture in pictures)
    for place, (picture, truth, chances) in enumerate(zip(pictures, truths, probabilities_SK, strict=True)):
        left = 0.25 + place % columns * (cell + 0.25)
        top = height - header - place // columns * (cell + bars + 0.25)
        scale = cell / longest
        h, w = picture.shape[0] * scale, picture.shape[1] * scale
        box = (left + (cell - w) / 2, top - cell, w, h)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        axes.imshow(picture, aspect="auto", interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#d0d0d0", linewidth=0.8)
        axes = figure.add_axes((left / width, (top - cell - bars + 0.04) / height, cell / width, (bars - 0.1) / height))
        _plot_chances(axes, chances, truth, classes)
    _save(figure, path)


def _plot_chances(axes: Axes, chances_K: np.ndarray, truth: int, classes: Sequence[str]) -> None:
    best = np.argsort(-chances_K)[:3]
    for line, k in enumerate(best):
        color = RIGHT if k == truth else WRONG if line == 0 else GREY
        axes.barh(line, 1, height=0.86, color="#f3f3f3")
        axes.barh(line, chances_K[k], height=0.86, color=color, alpha=0.45)
        axes.text(0.02, line, classes[k], fontsize=7.5, va="center", color=INK)
        axes.text(0.98, line, f"{chances_K[k]:.0%}", fontsize=7.5, va="center", ha="right", color=INK)
    if truth not in best:
        axes.text(
            0.02, len(best), f"is {classes[truth]}, {chances_K[truth]:.1%}", fontsize=7.5, va="center", color=RIGHT
        )
    axes.set(xlim=(0, 1), ylim=(3.45, -0.5))
    axes.axis("off")


def plot_packs(path: Path, packs: Sequence[dict[str, Any]], token_budget: int, patch_size: int) -> None:
    """Draw packs: above, the images, numbered and framed in their colours, dropped patches faded; below, all tokens.

    A pack is {"title": str, "pictures": [...], "cu_seqlens": (S+1,), "coords": (T, 2) row and column of each token},
    pictures being the images as they were packed, sides multiples of patch_size. Token lines run left to right and
    wrap. What no image owns is hatched.
    """
    strip, head, rest = 9.0, 0.45, 0.25  # inches
    per_line = max(32, 2 ** round(np.log2(4 * token_budget) / 2))  # about four times as many as lines
    lines = -(-token_budget // per_line)
    height_tokens = strip * lines / per_line  # a token is square
    rows = [_rows_of_images([p.shape[:2] for p in pack["pictures"]], gap=patch_size, strip=strip) for pack in packs]
    height_images = [strip * tall / wide for _, wide, tall in rows]
    width, height = strip + 0.6, sum(height_images) + len(packs) * (head + 0.08 + height_tokens + rest)
    figure = Figure(figsize=(width, height))
    top = height
    for pack, (corners, wide, tall), inches in zip(packs, rows, height_images, strict=True):
        used = int(pack["cu_seqlens"][-1])
        text = (
            f"{pack['title']}: {len(pack['pictures'])} images, {used:,} of {token_budget:,} tokens "
            f"({used / token_budget:.1%} full)"
        )
        figure.text(0.3 / width, (top - 0.28) / height, text, fontsize=11, color=INK, va="center")
        top -= head + inches
        axes = figure.add_axes((0.3 / width, top / height, strip / width, inches / height))
        _plot_owners(axes, pack, corners, patch_size)
        axes.set(xlim=(0, wide), ylim=(tall, 0))
        axes.axis("off")
        top -= 0.08 + height_tokens
        axes = figure.add_axes((0.3 / width, top / height, strip / width, height_tokens / height))
        _plot_tokens(axes, pack["cu_seqlens"], per_line, token_budget)
        top -= rest
    _save(figure, path)


def _rows_of_images(sizes: Sequence[tuple[int, int]], gap: int, strip: float) -> tuple[list[tuple[int, int]], int, int]:
    """Where images stand that wrap like words, 0.7 inches a line: corners (x, y), width and height in pixels."""
    tallest = max(height for height, _ in sizes) + gap
    wide = max(round(strip / 0.7 * tallest), max(width for _, width in sizes) + gap)
    corners, x, floor = [], 0, tallest
    for height, width in sizes:
        if x + width + gap > wide:
            x, floor = 0, floor + tallest
        corners.append((x + gap // 2, floor - height))
        x += width + gap
    return corners, wide, floor + gap // 2


def _plot_owners(axes: Axes, pack: dict[str, Any], corners: Sequence[tuple[int, int]], patch_size: int) -> None:
    starts, coords = np.asarray(pack["cu_seqlens"]), np.asarray(pack["coords"])
    for place, (picture, (x, y)) in enumerate(zip(pack["pictures"], corners, strict=True)):
        h, w = picture.shape[:2]
        kept = np.zeros((h // patch_size, w // patch_size, 1), dtype=bool)
        kept[tuple(coords[starts[place] : starts[place + 1]].T)] = True
        kept = kept.repeat(patch_size, 0).repeat(patch_size, 1)
        shown = np.where(kept, picture, 0.15 * picture + 0.85 * 225).astype(np.uint8)
        axes.imshow(shown, extent=(x, x + w, y + h, y), interpolation="antialiased", aspect="auto")
        color = OWNERS[place % len(OWNERS)]
        axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=1.6))
        axes.text(x + 1, y + 1, str(place + 1), fontsize=5.5, va="top", color=_ink_on(color), bbox=_tag(color))


def _plot_tokens(axes: Axes, cu_seqlens: Sequence[int], per_line: int, token_budget: int) -> None:
    starts = [int(start) for start in cu_seqlens]
    for place, (begin, end) in enumerate(pairwise(starts)):
        color, labelled = OWNERS[place % len(OWNERS)], False
        for x, line, length in _parts(begin, end, per_line):
            axes.add_patch(Rectangle((x, line), length, 1, facecolor=color, edgecolor="white", linewidth=0.4))
            if not labelled and length >= per_line / 40:
                where, ink = (x + length / 2, line + 0.53), _ink_on(color)
                axes.text(*where, str(place + 1), fontsize=4.5, ha="center", va="center", color=ink)
                labelled = True
    for x, line, length in _parts(starts[-1], token_budget, per_line):
        hatched = Rectangle((x, line), length, 1, facecolor="#f6f6f6", edgecolor="#b5b5b5", hatch="////", linewidth=0)
        axes.add_patch(hatched)
    axes.set(xlim=(0, per_line), ylim=(-(-token_budget // per_line), 0), xticks=[], yticks=[])
    axes.spines[:].set(color=GREY, linewidth=0.8)


def _parts(begin: int, end: int, per_line: int) -> Iterator[tuple[int, int, int]]:
    """A stretch of tokens as (place in the line, line, length)."""
    for line in range(begin // per_line, -(-end // per_line)):
        left, right = max(begin - line * per_line, 0), min(end - line * per_line, per_line)
        yield left, line, right - left


def _ink_on(color: tuple[float, ...]) -> str:
    """White on dark colours, ink on light ones."""
    return "white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.62 else INK


def _tag(color: tuple[float, ...]) -> dict[str, Any]:
    return {"facecolor": color, "edgecolor": "none", "boxstyle": "square,pad=0.15"}


def plot_curves(path: Path, metrics: Sequence[dict[str, Any]], majority: float, chance: float) -> None:
    """Draw loss and accuracy against steps from the lines of metrics.jsonl."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.array([m["step"] for m in metrics if "loss" in m])
    loss = np.array([m["loss"] for m in metrics if "loss" in m])
    accuracy = np.array([m["accuracy"] for m in metrics if "loss" in m])
    span = max(1, len(steps) // 20)
    left.plot(steps, loss, color=ACCENT, alpha=0.25, linewidth=1)
    left.plot(*_smooth(steps, loss, span), color=ACCENT, linewidth=2, label="training packs")
    right.plot(*_smooth(steps, accuracy, span), color=ACCENT, linewidth=2, label="training packs")
    held_out = [m for m in metrics if "held_out_accuracy" in m]
    if held_out:
        at = [m["step"] for m in held_out]
        left.plot(at, [m["held_out_loss"] for m in held_out], "o-", color=RIGHT, markersize=4, label="held out")
        scores = [m["held_out_accuracy"] for m in held_out]
        right.plot(at, scores, "o-", color=RIGHT, markersize=4, label="held out")
        right.annotate(
            f"{scores[-1]:.1%}", (at[-1], scores[-1]), (0, 7), textcoords="offset points", ha="right", color=RIGHT
        )
    right.axhline(
        majority, color=GREY, linestyle="--", linewidth=1.2, label=f"always the majority class {majority:.1%}"
    )
    if chance < 0.9 * majority:
        right.axhline(chance, color=GREY, linestyle=":", linewidth=1.2, label=f"chance {chance:.1%}")
    left.set(title="loss", xlabel="step", ylim=(0, None))
    right.set(title="accuracy", xlabel="step", ylim=(0, 1))
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        _plain(axes)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _smooth(x: np.ndarray, y: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    return x[span - 1 :], np.convolve(y, np.full(span, 1 / span), mode="valid")


def plot_tradeoff(path: Path, rows: Sequence[dict[str, float]], majority: float) -> None:
    """Draw accuracy and cost against tokens per image; a row is {"tokens", "accuracy", "gflops", "milliseconds"}."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [row["accuracy"] for row in rows], "o-", color=RIGHT, linewidth=2)
    for row in rows:
        left.annotate(
            f"{row['accuracy']:.1%}", (row["tokens"], row["accuracy"]), (0, 8), textcoords="offset points", ha="center"
        )
    left.axhline(majority, color=GREY, linestyle="--", linewidth=1.2)
    left.annotate(
        f"majority class {majority:.1%}",
        (tokens[-1], majority),
        (0, 4),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    left.set(title="accuracy", xlabel="tokens per image (mean)", ylim=(0, 1))
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    right.plot(tokens, [row["milliseconds"] for row in rows], "o-", color=ACCENT, linewidth=2)
    for row in rows:
        where = (row["tokens"], row["milliseconds"])
        right.annotate(f"{row['gflops']:.2g} GFLOP", where, (7, -12), textcoords="offset points", color=INK)
    right.set(title="cost", xlabel="tokens per image (mean)", ylabel="milliseconds per image", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlim(0, 1.2 * max(tokens))
        _plain(axes)
    _save(figure, path)
