"""The run folder: what a training run leaves behind, and what it needs to go on.

config.json and model.safetensors (what `NaViT.from_pretrained` reads), settings.json (data, sizes and how it was
trained), resume.pt (all state, weights included), metrics.jsonl and pictures (*.png).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .model import NaViT
from .train import Settings

SETTINGS, STATE, METRICS = "settings.json", "resume.pt", "metrics.jsonl"


class UserError(Exception):
    """Something the user can mend; the message is one clear line."""


class RunFolder:
    """A folder that belongs to one run. Nothing in it is written over unless the run is resumed or overwritten."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, settings: Settings, overwrite: bool = False) -> RunFolder:
        """A new folder. An existing one is refused, or, with overwrite, emptied if it is a run folder."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not overwrite:
                raise UserError(f"{path} exists already: give another --run, or --resume or --overwrite")
            if not (path / SETTINGS).exists():
                raise UserError(f"{path} is no run folder (it has no {SETTINGS}), so it is not overwritten")
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run.write(SETTINGS, json.dumps(asdict(settings), indent=2) + "\n")
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        if not path.is_dir():
            raise UserError(f"no run folder at {path}")
        if not (path / SETTINGS).exists():
            raise UserError(f"{path} is no run folder: it has no {SETTINGS}")
        return cls(path)

    def settings(self) -> Settings:
        try:
            return Settings.from_dict(json.loads((self.path / SETTINGS).read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path / SETTINGS} is broken: {error}") from None

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        part = self.path / f"{name}.part"
        part.write_text(text)
        os.replace(part, self.path / name)

    def append(self, metrics: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        with open(self.path / METRICS, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in metrics)

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self, model: NaViT, state: dict[str, Any]) -> None:
        """Write the weights and the state to resume from; each file whole or not at all."""
        torch.save(state, self.path / f"{STATE}.part")
        os.replace(self.path / f"{STATE}.part", self.path / STATE)
        model.save_pretrained(self.path)

    def load_state(self) -> dict[str, Any]:
        """The state saved last; metrics of later steps are forgotten."""
        path = self.path / STATE
        if not path.exists():
            raise UserError(f"{self.path} cannot be resumed: it has no {STATE}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{path} is broken: {str(error).splitlines()[0]}") from None
        kept = [line for line in self.metrics() if line["step"] <= state["step"]]
        self.write(METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        return state


def load_model(folder: Path, load: Callable[[Path], NaViT] = NaViT.from_pretrained) -> NaViT:
    """A saved model, on the CPU."""
    try:
        return load(folder)
    except Exception as error:
        raise UserError(f"no model can be loaded from {folder}: {str(error).splitlines()[0]}") from None
