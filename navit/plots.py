"""The pictures of a run folder. Every function takes plain arrays and writes one PNG.

Shapes: T tokens, S images, K classes. Pictures are uint8 arrays (height, width, 3).
"""

from collections.abc import Sequence
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
    figure.savefig(path, dpi=110, facecolor="white")


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
        axes.imshow(picture, aspect="auto", interpolation="nearest")
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
    """Draw packs: above, each image in its owner's colour; below, the tokens in packed order, as the model reads them.

    A pack is {"pictures": [...], "cu_seqlens": (S+1,), "coords": (T, 2) row and column of each token}, pictures being
    the resized images whose sides are multiples of patch_size. Token lines run left to right and wrap; what no image
    owns is hatched.
    """
    per_line = 32 * max(1, round((4 * token_budget) ** 0.5 / 32))  # about a quarter as many lines
    lines = -(-token_budget // per_line)
    gap = patch_size // 2
    totals = [sum(p.shape[1] + gap for p in pack["pictures"]) for pack in packs]
    tallest = [max(p.shape[0] for p in pack["pictures"]) + gap for pack in packs]
    strip, title, rest = 9.0, 0.4, 0.2  # inches
    height_images = [min(1.6, strip * h / w) for h, w in zip(tallest, totals, strict=True)]
    height_tokens = strip * lines / per_line  # a token is square
    width, height = strip + 0.6, sum(height_images) + len(packs) * (title + height_tokens + rest)
    figure = Figure(figsize=(width, height))
    top = height
    for k, pack in enumerate(packs):
        images, used = len(pack["cu_seqlens"]) - 1, int(pack["cu_seqlens"][-1])
        text = f"pack {k + 1}: {images} images, {used} of {token_budget} tokens ({used / token_budget:.1%} full)"
        figure.text(0.3 / width, (top - 0.25) / height, text, fontsize=11, color=INK, va="center")
        top -= title + height_images[k]
        axes = figure.add_axes((0.3 / width, top / height, strip / width, height_images[k] / height))
        axes.set(xlim=(-gap / 2, strip / height_images[k] * tallest[k]), ylim=(tallest[k], -gap / 2))
        _plot_owners(axes, pack["pictures"], gap)
        top -= height_tokens
        axes = figure.add_axes((0.3 / width, top / height, strip / width, height_tokens / height))
        _plot_tokens(axes, pack, per_line, lines, token_budget, patch_size)
        top -= rest
    _save(figure, path)


def _plot_owners(axes: Axes, pictures: Sequence[np.ndarray], gap: int) -> None:
    """Images in packed order at one scale, framed in their colours, standing on one line."""
    x, floor = 0, max(p.shape[0] for p in pictures)
    limits = axes.axis()
    for place, picture in enumerate(pictures):
        h, w = picture.shape[:2]
        axes.imshow(picture, extent=(x, x + w, floor, floor - h), interpolation="nearest", aspect="auto")
        color = OWNERS[place % len(OWNERS)]
        axes.add_patch(Rectangle((x, floor - h), w, h, fill=False, edgecolor=color, linewidth=2.5))
        x += w + gap
    axes.axis(limits)
    axes.axis("off")


def _plot_tokens(
    axes: Axes, pack: dict[str, Any], per_line: int, lines: int, token_budget: int, patch_size: int
) -> None:
    starts, coords = np.asarray(pack["cu_seqlens"]), np.asarray(pack["coords"])
    skip = max(1, patch_size * per_line // 2048)  # draw every so many pixels of a patch
    side = -(-patch_size // skip)
    canvas, rim = np.ones((lines * side, per_line * side, 4), dtype=np.float32), max(1, side // 8)
    for place, picture in enumerate(pack["pictures"]):
        for token in range(starts[place], starts[place + 1]):
            row, column = coords[token] * patch_size
            y, x = token // per_line * side, token % per_line * side
            cell = canvas[y : y + side, x : x + side]
            cell[..., :3] = picture[row : row + patch_size : skip, column : column + patch_size : skip] / 255.0
            color = np.array(OWNERS[place % len(OWNERS)])
            cell[:] = 0.75 * cell + 0.25 * color  # a tint over the token, its full colour as a line above and below
            cell[:rim] = cell[-rim:] = color
            if token == starts[place]:
                cell[:, :rim] = color
    axes.imshow(canvas, extent=(0, per_line, lines, 0), interpolation="nearest", aspect="auto")
    used = int(starts[-1])
    for line in range(used // per_line, lines):
        begin, end = max(0, used - line * per_line), min(per_line, token_budget - line * per_line)
        if end > begin:
            corner, size = (begin, line), end - begin
            axes.add_patch(
                Rectangle(corner, size, 1, facecolor="#f4f4f4", edgecolor="#b5b5b5", hatch="////", linewidth=0)
            )
    axes.set(xlim=(0, per_line), ylim=(lines, 0), xticks=[], yticks=[])
    axes.spines[:].set(color=GREY, linewidth=0.8)


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
