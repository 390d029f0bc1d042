"""Training and evaluation: packs in, metrics and a run folder out.

A run folder holds config.json and model.safetensors (what `NaViT.from_pretrained` reads), training.json (how it was trained),
resume.pt (all that is needed to go on), metrics.jsonl and pictures.

T tokens, S images, K classes.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import NaViT
from .packing import PackedImages

Batch = tuple[PackedImages, Tensor]  # a pack and its labels_S


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults of learning rate, decays and schedule are the paper's."""

    steps: int  # packs in all
    learning_rate: float = 8e-4  # at the end of the warm-up
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["rsqrt", "cosine", "constant"] = "rsqrt"
    cooldown: int = 0  # steps of linear decay to zero at the end
    timescale: int = 10_000  # steps after the warm-up in which rsqrt halves the square of the rate
    decay_head: float = 3.0  # weight decay of the classifier's matrix
    decay_body: float = 0.03  # weight decay of every other matrix; biases, norms and tables have none
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0  # softmax only
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    evaluate_every: int = 0  # steps between evaluations; 0: only at the end
    save_every: int = 0  # steps between checkpoints; 0: only at the end


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
    """AdamW with the paper's two weight decays: one for the head's matrix, one for all other linear layers' matrices."""
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
    """Mean over images of the softmax cross-entropy, or of the sigmoid cross-entropy summed over classes."""
    if config.loss == "softmax":
        return F.cross_entropy(logits_SK, labels_S, label_smoothing=config.label_smoothing)
    targets_SK = F.one_hot(labels_S, logits_SK.shape[1]).to(logits_SK.dtype)
    return F.binary_cross_entropy_with_logits(logits_SK, targets_SK, reduction="sum") / len(labels_S)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Trainer:
    """A model in training: `run` goes through batches; `state` and `load_state` stop and go on, bitwise."""

    def __init__(self, model: NaViT, config: TrainConfig, compiled: bool = False) -> None:
        self.model, self.config, self.step = model, config, 0
        self.forward = torch.compile(model, fullgraph=True) if compiled else model
        self.optimizer = make_optimizer(model, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(step, config))

    def run(self, batches: Iterable[Batch]) -> Iterator[dict[str, float]]:
        """Take one step per batch and yield its metrics. The caller may evaluate or save between steps."""
        device = next(self.model.parameters()).device
        self.model.train()
        before = time.perf_counter()
        for packed, labels_S in batches:
            packed, labels_S = packed.to(device, non_blocking=True), labels_S.to(device, non_blocking=True)
            rate = self.scheduler.get_last_lr()[0]
            with autocast(device):
                logits_SK = self.forward(packed).float()
                loss = classification_loss(logits_SK, labels_S, self.config)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            metrics = {
                "step": self.step,
                "loss": loss.item(),
                "accuracy": (logits_SK.argmax(1) == labels_S).float().mean().item(),
                "learning_rate": rate,
                "gradient_norm": norm.item(),
                "images": len(packed),
                "tokens": packed.tokens,
                "fill": packed.fill,
                "seconds": time.perf_counter() - before,
            }
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {self.step}; try a lower learning rate")
            yield metrics
            self.model.train()
            before = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """All that training depends on, but for the batches: give those from number `step` on."""
        return {
            "step": self.step,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch, "_last_lr": self.scheduler.get_last_lr()},
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


@torch.no_grad()
def predict_logits(model: NaViT, packs: Iterable[PackedImages]) -> Tensor:
    """(S, K) float32 logits on the CPU, in the order of the list that was packed."""
    device = next(model.parameters()).device
    model.eval()
    rows, places = [], []
    for packed in packs:
        with autocast(device):
            rows.append(model(packed.to(device)).float().cpu())
        places.append(packed.order.cpu())
    return torch.cat(rows)[torch.argsort(torch.cat(places))]
