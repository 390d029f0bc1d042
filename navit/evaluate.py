"""A trained model on a set of images: its outputs, its score, and what a score costs.

S images, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import DataError, ImageSet, SkipReport, batches
from .images import Resize
from .model import NaViT
from .train import Batch, Settings, autocast, classification_loss


@dataclass(frozen=True)
class Outputs:
    """A model's rows (S, N) float32 for the images of a set that could be used, on the CPU, in the set's order."""

    rows_SN: Tensor
    labels_S: Tensor
    places_S: Tensor  # in the set
    seconds: float  # in the model


@dataclass(frozen=True)
class Score:
    """How a model does on labelled images."""

    loss: float
    accuracy: float
    probabilities_SK: Tensor
    labels_S: Tensor
    places_S: Tensor


def view_batches(
    images: ImageSet, settings: Settings, model: NaViT, view: Resize | None = None, skipped: SkipReport | None = None
) -> Iterator[Batch]:
    """Packs of images as settings.view, or another view, shows them: in the set's order, nothing dropped or changed."""
    return batches(
        images,
        token_budget=settings.token_budget,
        **model.config.pack_options,
        resize=view or settings.view,
        shuffle=False,
        report=skipped,
    )


@torch.no_grad()
def outputs(model: NaViT, packs: Iterable[Batch]) -> Outputs:
    """Run a model in eval mode on packs whose order names places in one set."""
    device = next(model.parameters()).device
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    seconds = 0.0
    for packed, labels_S in packs:
        begin = time.perf_counter()
        with autocast(device):
            rows_SN = model(packed.to(device, non_blocking=True)).float().cpu()
        seconds += time.perf_counter() - begin
        parts.append((rows_SN, labels_S, packed.order))
    if not parts:
        nothing = torch.empty(0, dtype=torch.long)
        return Outputs(torch.empty(0, 0), nothing, nothing, 0.0)
    rows_SN, labels_S, places_S = (torch.cat(part) for part in zip(*parts, strict=True))
    order = places_S.argsort()
    return Outputs(rows_SN[order], labels_S[order], places_S[order], seconds)


def probabilities(logits_SK: Tensor, settings: Settings) -> Tensor:
    return logits_SK.softmax(1) if settings.train.loss == "softmax" else logits_SK.sigmoid()


def score(model: NaViT, images: ImageSet, settings: Settings, skipped: SkipReport | None = None) -> Score:
    """Evaluate on labelled images. Raises DataError when none can be used."""
    found = outputs(model, view_batches(images, settings, model, skipped=skipped))
    if not len(found.labels_S):
        raise DataError(f"none of the {len(images)} held-out images can be used")
    loss = classification_loss(found.rows_SN, found.labels_S, settings.train).item()
    accuracy = (found.rows_SN.argmax(1) == found.labels_S).float().mean().item()
    return Score(loss, accuracy, probabilities(found.rows_SN, settings), found.labels_S, found.places_S)


def majority_baseline(train: ImageSet, held_out: ImageSet) -> float:
    """Accuracy on held-out images of always answering the class that is most frequent in training."""
    return float(np.mean(np.array(held_out.labels) == np.bincount(train.labels).argmax()))


def cost_and_accuracy(
    model: NaViT, images: ImageSet, settings: Settings, max_tokens: int, skipped: SkipReport
) -> dict[str, float]:
    """Evaluate with every image resized to as many tokens as fit into max_tokens.

    Returns the means over images of tokens, accuracy, gflops (forward) and milliseconds (in the model).
    """
    view = Resize("tokens", max_tokens=max_tokens)
    for batch in view_batches(images, settings, model, view):
        outputs(model, [batch])  # the first pack pays for warming up
        break
    tokens = flops = 0

    def counted() -> Iterator[Batch]:
        nonlocal tokens, flops
        for packed, labels_S in view_batches(images, settings, model, view, skipped):
            tokens += packed.coords.shape[0]
            flops += sum(model.config.flops_per_image(y, x, training=False) for y, x in packed.grids.tolist())
            yield packed, labels_S

    found = outputs(model, counted())
    count = max(1, len(found.labels_S))
    return {
        "tokens": tokens / count,
        "accuracy": (found.rows_SN.argmax(1) == found.labels_S).float().mean().item(),
        "gflops": flops / count / 1e9,
        "milliseconds": found.seconds / count * 1e3,
    }
