"""What a case of bench_integrations.py is. Each file integration_cases_*.py beside this one holds

    CASES: dict[str, Case]      name -> Case(patch_size, build)

and build(grids, device, small) gives the sides, {"before": Side, "after": Side, ...}: the others are measured
against the first, in result and in time. `grids` are (rows, columns) of patches per image; with small=True the model is
a tiny one, for --smoke. A package that is missing raises peers.PeerMissing. Models that `kept` made, and what was
compiled of them, stay for all images of a case.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

Grids = list[tuple[int, int]]
IMAGES = ("pt", "ft", "1k", "4k")  # two mixes of sizes, and one image of 1,024 or 4,096 tokens
DIRECTIONS = ("forward", "train")


class Side(NamedTuple):
    """run() does what a user's step does, host work included, and gives one differentiable tensor.

    The sides of a case give the same tensor. Gradients of parameters of the same name are compared.
    autocast: to bf16, on a GPU. directions: which of the case's it can run.
    """

    model: nn.Module
    run: Callable[[], Tensor]
    autocast: bool = True
    directions: Sequence[str] = DIRECTIONS


class Case(NamedTuple):
    """patch_size: pixels a side, for drawing images. directions, images: those that the sides can run."""

    patch_size: int
    build: Callable[[Grids, str, bool], dict[str, Side]]
    directions: Sequence[str] = DIRECTIONS
    images: Sequence[str] = IMAGES


_kept: list[Callable[[], None]] = []


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """make(...), once for the same arguments until `forget`."""
    made = functools.lru_cache(maxsize=1)(make)
    _kept.append(made.cache_clear)
    return made


def forget() -> None:
    for clear in _kept:
        clear()


def all_cases() -> dict[str, Case]:
    """The cases of every file, name by name."""
    found: dict[str, Case] = {}
    for path in sorted(Path(__file__).parent.glob("integration_cases_*.py")):
        found |= importlib.import_module(path.stem).CASES
    return found
