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
from .evaluate import Score, majority_baseline, score, view_batches
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
    columns = (BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[now]}"))
    recent: deque[dict[str, float]] = deque(maxlen=SMOOTHED)
    with Progress(*columns, console=console) as progress:
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
    draw(run, last, trainer, stream, held_out, majority)
    for report in (stream.skipped, skipped):
        if report:
            console.print(str(report), style="yellow", markup=False)
    right, count = round(last.accuracy * len(last.labels_S)), len(last.labels_S)
    console.print(
        f"[bold]held-out accuracy {last.accuracy:.1%}[/] ({right} of {count} images); "
        f"always answering the majority class: {majority:.1%}",
        soft_wrap=True,
    )
    console.print(f"run folder: {run.path}, with predictions.png, packs.png and curves.png", soft_wrap=True)
    return last


def _figures(recent: deque[dict[str, float]]) -> str:
    total = {name: sum(step[name] for step in recent) for name in ("loss", "images", "tokens", "fill", "seconds")}
    seconds = total["seconds"]
    return (
        f"loss {total['loss'] / len(recent):.2f} · {total['images'] / seconds:,.0f} images/s · "
        f"{total['tokens'] / seconds:,.0f} tokens/s · fill {total['fill'] / len(recent):.1%}"
    )


def draw(
    run: RunFolder, last: Score, trainer: Trainer, stream: BatchStream, held_out: ImageSet, majority: float
) -> None:
    """Write the three pictures of a run."""
    classes = held_out.classes
    plots.plot_curves(run.path / "curves.png", run.metrics(), majority, 1 / len(classes))
    count = min(PICTURES, len(last.places_S))
    rows_S = np.sort(np.random.default_rng(0).choice(len(last.places_S), count, replace=False))
    shown = last.places_S[rows_S].tolist()  # places in the held-out set
    pictures = [_picture(load_image(held_out.paths[place])) for place in shown]
    truths, chances = last.labels_S[rows_S].tolist(), last.probabilities_SK[rows_S].numpy()
    plots.plot_predictions(run.path / "predictions.png", pictures, truths, chances, classes)
    settings, model = stream.settings, trainer.model
    first, _ = next(iter(BatchStream(stream.images, settings, model.config)))
    views = view_batches(held_out.select([place in shown for place in range(len(held_out))]), settings, model)
    packs = [pack_parts("the first training pack, dropped patches faded", first)]
    *_, (last_of_views, _) = views
    packs.append(pack_parts("the last pack of held-out images", last_of_views))
    plots.plot_packs(run.path / "packs.png", packs, settings.token_budget, model.config.patch_size)


def _picture(image_CHW: Tensor) -> np.ndarray:
    return image_CHW.permute(1, 2, 0).numpy()


def pack_parts(title: str, packed: PackedImages) -> dict[str, Any]:
    """What `plot_packs` draws of a pack."""
    pixels = packed.pixels
    assert pixels is not None
    shapes = [(pixels.channels, height, width) for height, width in pixels.sizes_S2.tolist()]
    flat = pixels.pixels.split([int(np.prod(shape)) for shape in shapes])
    pictures = [_picture(part.view(shape)) for part, shape in zip(flat, shapes, strict=True)]
    return {
        "title": title,
        "pictures": pictures,
        "cu_seqlens": packed.cu_seqlens.numpy(),
        "coords": packed.coords.numpy(),
    }
