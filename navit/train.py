"""Training: its settings, the stream of batches, the steps, and a model's outputs for a set of images.

T tokens, S images, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NaViTConfig
from .data import DataError, ImageSet, SkipReport, batches
from .graphs import Captured, pad_pack
from .images import Augment, Resize
from .model import NaViT
from .packing import PackedImages, scheduled_rate

Batch = tuple[PackedImages, Tensor]  # a pack and the labels of its images
REPORT_EVERY = 10  # steps between looks at a GPU's losses
NO_IMAGE = -100  # the label of a segment of padding
SCHEDULES, LOSSES = ("rsqrt", "cosine", "constant"), ("softmax", "sigmoid")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults of learning rate, decays and schedule are the paper's."""

    steps: int  # packs in all
    learning_rate: float = 8e-4  # at the end of the warm-up
    warmup: int = 100  # steps of linear warm-up
    schedule: str = "rsqrt"  # or "cosine", "constant"
    cooldown: int = 0  # steps of linear decay to zero at the end
    timescale: int = 10_000  # rsqrt: the rate falls as 1 / sqrt(1 + steps since the warm-up / timescale)
    decay_head: float = 3.0  # weight decay of the classifier's matrix
    decay_body: float = 0.03  # weight decay of every other matrix; biases, norms and tables have none
    loss: str = "softmax"  # or "sigmoid"
    label_smoothing: float = 0.0  # softmax only
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    evaluate_every: int = 0  # steps between evaluations; 0: only at the end
    save_every: int = 0  # steps between checkpoints; 0: only at the end


@dataclass(frozen=True)
class Settings:
    """A run, but for its model's configuration: what settings.json holds."""

    data: str  # a data set that `read_images` takes
    classes: tuple[str, ...]
    train: TrainConfig
    token_budget: int = 4096  # tokens per pack
    image_budget: int | None = None  # images per pack at most; given, packs are padded and a GPU replays CUDA graphs
    resize: Resize = field(default_factory=lambda: Resize("uniform"))  # of training images
    view: Resize = field(default_factory=Resize)  # of all other images
    augment: Augment = field(default_factory=Augment)
    token_drop: tuple[float, float] = (0.0, 0.0)  # share of a training image's tokens, at the start and at the end

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Settings:
        """The inverse of `dataclasses.asdict`, JSON in between. Raises TypeError for unknown or missing fields."""
        kinds = {"train": TrainConfig, "resize": Resize, "view": Resize, "augment": Augment}
        parts = {name: kinds[name](**value) if name in kinds else value for name, value in given.items()}
        settings = cls(**parts)
        object.__setattr__(settings, "classes", tuple(settings.classes))
        object.__setattr__(settings, "token_drop", tuple(settings.token_drop))
        return settings


class BatchStream:
    """Training batches, epoch after epoch. `position` says where the next one stands, to go on from there."""

    def __init__(self, images: ImageSet, settings: Settings, config: NaViTConfig, workers: int = 0) -> None:
        self.images, self.settings, self.config, self.workers = images, settings, config, workers
        self.position = {"step": 0, "epoch": 0, "offset": 0}  # batches in all, whole epochs, batches in this epoch
        self.skipped = SkipReport()

    def epoch_batches(self) -> Iterator[Batch]:
        settings = self.settings
        return batches(
            self.images,
            token_budget=settings.token_budget,
            image_budget=settings.image_budget,
            **self.config.pack_options,
            resize=settings.resize,
            augment=settings.augment,
            token_drop=self.drop_rate,
            seed=settings.train.seed,
            epoch=self.position["epoch"],
            workers=self.workers,
            report=self.skipped,
        )

    def drop_rate(self, rows: int, columns: int) -> float:
        """Token drop now: from the first rate to the second along a sigmoid in time, as the paper schedules it."""
        start, end = self.settings.token_drop
        return scheduled_rate(self.position["step"] / self.settings.train.steps, start, end, 0.5, 0.1)

    def __iter__(self) -> Iterator[Batch]:
        position = self.position
        while True:
            seen = position["offset"]  # before the run was resumed: these are made again and passed over
            position["step"], position["offset"] = position["step"] - seen, 0
            for batch in self.epoch_batches():
                position["step"], position["offset"] = position["step"] + 1, position["offset"] + 1
                if position["offset"] > seen:
                    yield batch
            if not position["offset"]:
                raise DataError(f"{self.settings.data}: none of the {len(self.images)} training images can be used")
            position["epoch"], position["offset"] = position["epoch"] + 1, 0


def rate_factor(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0) as a share of config.learning_rate."""
    after = step - config.warmup
    if after < 0:
        return (step + 1) / config.warmup
    factor = {
        "constant": 1.0,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * after / max(1, config.steps - config.warmup)),
        "rsqrt": math.sqrt(config.timescale / (config.timescale + after)),
    }[config.schedule]
    return factor * min(1.0, (config.steps - step) / max(1, config.cooldown))


def make_optimizer(model: NaViT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the paper's two weight decays: one for the head's matrix, one for all other linear layers."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    head = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("head.")} & matrices
    groups: dict[float, list[nn.Parameter]] = {config.decay_head: [], config.decay_body: [], 0.0: []}
    for parameter in model.parameters():
        known = id(parameter)
        decay = config.decay_head if known in head else config.decay_body if known in matrices else 0.0
        groups[decay].append(parameter)
    fused = next(model.parameters()).is_cuda
    parts = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
    return torch.optim.AdamW(parts, lr=config.learning_rate, betas=(0.9, 0.99), fused=fused or None)


def classification_loss(logits_SK: Tensor, labels_S: Tensor, config: TrainConfig) -> Tensor:
    """Mean over images of the softmax cross-entropy, or of the sigmoid cross-entropy summed over classes.

    Rows whose label is NO_IMAGE do not count.
    """
    if config.loss == "softmax":
        return F.cross_entropy(logits_SK, labels_S, ignore_index=NO_IMAGE, label_smoothing=config.label_smoothing)
    image_S1 = (labels_S != NO_IMAGE)[:, None]
    targets_SK = F.one_hot(labels_S.clamp(min=0), logits_SK.shape[1]).to(logits_SK.dtype)
    weights_SK = image_S1.to(logits_SK.dtype).expand_as(logits_SK)
    return F.binary_cross_entropy_with_logits(logits_SK, targets_SK, weights_SK, reduction="sum") / image_S1.sum()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Trainer:
    """A model in training: `run` goes through batches; `state` and `load_state` stop and go on, bitwise."""

    def __init__(
        self,
        model: NaViT,
        config: TrainConfig,
        compiled: bool = False,
        image_budget: int | None = None,
        token_drop: float = 0.0,
    ) -> None:
        """image_budget: pad packs to it and their token budget, by `pad_pack`, which takes token_drop too. Then a GPU
        replays forward and backward as a CUDA graph.
        """
        self.model, self.config, self.step = model, config, 0
        self.image_budget, self.token_drop = image_budget, token_drop
        self.captured: Captured | None = None
        self.forward = torch.compile(model, fullgraph=True) if compiled else model
        self.optimizer = make_optimizer(model, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(step, config))

    def run(self, batches: Iterable[Batch]) -> Iterator[list[dict[str, float]]]:
        """Take one step per batch and yield the metrics that have arrived since the last yield.

        A GPU is waited for every REPORT_EVERY steps, and wherever config says to evaluate or save, so some yields are
        empty. The caller may evaluate or save between steps. Raises FloatingPointError when the loss is not finite.
        """
        device = next(self.model.parameters()).device
        report_every = 1 if device.type == "cpu" else REPORT_EVERY
        pending: list[tuple[dict[str, float], Tensor]] = []
        self.model.train()
        before = time.perf_counter()
        for packed, labels_S in batches:
            known = {"images": len(packed), "tokens": packed.tokens, "fill": packed.fill}
            rate = self.scheduler.get_last_lr()[0]
            loss, right = self._passes(packed, labels_S, device)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            known = {"step": self.step, "learning_rate": float(rate), **known}
            pending.append((known, torch.stack([loss, right / known["images"], norm])))
            arrived = []
            if any(self.due(every) for every in (report_every, self.config.evaluate_every, self.config.save_every)):
                values = torch.stack([value for _, value in pending]).tolist()
                seconds = (time.perf_counter() - before) / len(pending)
                for (metrics, _), (loss_, accuracy_, norm_) in zip(pending, values, strict=True):
                    arrived.append({**metrics, "loss": loss_, "accuracy": accuracy_, "gradient_norm": norm_})
                    arrived[-1]["seconds"] = seconds
                    if not math.isfinite(loss_):
                        raise FloatingPointError(f"the loss is {loss_} at step {metrics['step']}")
                pending.clear()
            yield arrived
            if arrived:
                before = time.perf_counter()
                self.model.train()

    def _passes(self, packed: PackedImages, labels_S: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch: the loss, and how many images are classified right."""
        if self.image_budget is not None:
            packed = pad_pack(packed, self.image_budget, self.token_drop)
            labels_S = F.pad(labels_S, (0, packed.segments - len(packed)), value=NO_IMAGE)
        if device.type == "cuda":
            packed, labels_S = packed.pin_memory(), labels_S.pin_memory()
        packed, labels_S = packed.to(device, non_blocking=True), labels_S.to(device, non_blocking=True)
        if self.image_budget is None or device.type != "cuda":
            return self._forward_backward(packed, labels_S)
        if self.captured is None:
            self.captured = Captured(self._forward_backward, packed, labels_S)
        return self.captured(packed, labels_S)

    def _forward_backward(self, packed: PackedImages, labels_S: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)  # a captured step has its gradients where they were when recorded
        with autocast(labels_S.device):
            logits_SK = self.forward(packed).float()
        labels_S = labels_S[: len(logits_SK)]
        loss = classification_loss(logits_SK, labels_S, self.config)
        loss.backward()
        return loss.detach(), (logits_SK.argmax(1) == labels_S).sum()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) is due now."""
        return self.step == self.config.steps or bool(every and self.step % every == 0)

    def state(self) -> dict[str, Any]:
        """All that training depends on, but for the batches: give those from number `step` on."""
        return {
            "step": self.step,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
