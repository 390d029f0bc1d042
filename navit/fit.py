"""One training run from its first step, or from where it stopped, to its pictures."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from . import plots
from .data import ImageSet, SkipReport
from .evaluate import Score, majority_baseline, score
from .images import load_image
from .packing import PackedImages
from .runs import RunFolder
from .train import BatchStream, Settings, Trainer

PICTURES = 24  # held-out images in the picture of predictions
SMOOTHED = 20  # steps in the figures of the progress bar


def fit(
    run: RunFolder, trainer: Trainer, stream: BatchStream, held_out: ImageSet, settings: Settings, console: Console
) -> Score:
    """Train to the last step, with a progress bar; evaluate, save and draw into the run folder. Returns the score."""
    model, config = trainer.model, settings.train
    skipped = SkipReport()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[now]}"))
    recent: deque[dict[str, float]] = deque(maxlen=SMOOTHED)
    with Progress(TextColumn("train"), *columns, console=console) as progress:
        task = progress.add_task("", total=config.steps, completed=trainer.step, now="")
        for arrived in trainer.run(stream):
            run.append(arrived)
            recent.extend(arrived)
            if arrived:
                progress.update(task, completed=trainer.step, now=_figures(recent))
            if trainer.due(config.evaluate_every):
                last = score(model, held_out, settings, skipped=skipped)
                run.append([{"step": trainer.step, "held_out_loss": last.loss, "held_out_accuracy": last.accuracy}])
                console.print(f"step {trainer.step}: held-out accuracy {last.accuracy:.1%}, loss {last.loss:.3f}")
            if trainer.due(config.save_every):
                run.save(model, trainer.state() | {"position": stream.position})
            if trainer.step == config.steps:
                break
    majority = majority_baseline(stream.images, held_out)
    draw(run, last, stream, held_out, majority)
    for report in (stream.skipped, skipped):
        if report:
            console.print(str(report), style="yellow", markup=False)
    right, count = round(last.accuracy * len(last.labels_S)), len(last.labels_S)
    console.print(
        f"[bold]held-out accuracy {last.accuracy:.1%}[/] ({right} of {count} images); "
        f"always answering the majority class: {majority:.1%}"
    )
    console.print(f"run folder: {run.path} (weights, metrics.jsonl, predictions.png, packs.png, curves.png)")
    return last


def _figures(recent: deque[dict[str, float]]) -> str:
    total = {name: sum(step[name] for step in recent) for name in ("loss", "images", "tokens", "fill", "seconds")}
    seconds = total["seconds"]
    return (
        f"loss {total['loss'] / len(recent):.3f} · {total['images'] / seconds:,.0f} images/s · "
        f"{total['tokens'] / seconds:,.0f} tokens/s · packs {total['fill'] / len(recent):.1%} full"
    )


def draw(run: RunFolder, last: Score, stream: BatchStream, held_out: ImageSet, majority: float) -> None:
    """Write the three pictures of a run."""
    classes = held_out.classes
    plots.plot_curves(run.path / "curves.png", run.metrics(), majority, 1 / len(classes))
    count = min(PICTURES, len(last.places_S))
    chosen = np.sort(np.random.default_rng(0).choice(len(last.places_S), count, replace=False))
    pictures = [_picture(load_image(held_out.paths[int(last.places_S[k])])) for k in chosen]
    truths, chances = last.labels_S[chosen].tolist(), last.probabilities_SK[chosen].numpy()
    plots.plot_predictions(run.path / "predictions.png", pictures, truths, chances, classes)
    first = BatchStream(stream.images, stream.settings, stream.config)
    packs = [pack_parts(packed) for _, (packed, _) in zip(range(2), first, strict=False)]
    plots.plot_packs(run.path / "packs.png", packs, stream.settings.token_budget, stream.config.patch_size)


def _picture(image_CHW: Tensor) -> np.ndarray:
    return image_CHW.permute(1, 2, 0).numpy()


def pack_parts(packed: PackedImages) -> dict[str, Any]:
    """What `plot_packs` draws of a pack."""
    pixels = packed.pixels
    assert pixels is not None
    shapes = [(pixels.channels, height, width) for height, width in pixels.sizes_S2.tolist()]
    flat = pixels.pixels.split([int(np.prod(shape)) for shape in shapes])
    pictures = [_picture(part.view(shape)) for part, shape in zip(flat, shapes, strict=True)]
    return {"pictures": pictures, "cu_seqlens": packed.cu_seqlens.numpy(), "coords": packed.coords.numpy()}
