"""What `navit info` says: a model's size and cost, this machine's versions, and what runs each op here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.table import Table

import navit_kernels

from .config import NaViTConfig
from .model import NaViT

IMAGES = ((224, 224), (512, 384), (384, 1024), (1024, 1024))  # height, width in pixels
OPS = Path(navit_kernels.__file__).parent


def model_tables(name: str, config: NaViTConfig) -> list[Table]:
    """Size, and cost by image size."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in NaViT(config).parameters())
    size = Table("model", name)
    size.add_row("parameters", f"{count / 1e6:,.2f} M")
    size.add_row("width, depth", f"{config.width}, {config.depth}")
    size.add_row("heads × head width", f"{config.heads} × {config.width // config.heads}")
    size.add_row("QK norm", config.qk_norm)
    cost = Table("image", "tokens", "GFLOP forward", "and backward", title_justify="left")
    for height, width in IMAGES:
        rows, columns = round(height / config.patch_size), round(width / config.patch_size)
        if max(rows, columns) <= (config.pack_options["max_side"] or rows + columns):
            figures = (config.flops_per_image(rows, columns, training) / 1e9 for training in (False, True))
            cost.add_row(f"{height} × {width} pixels", f"{rows * columns:,}", *(f"{figure:,.1f}" for figure in figures))
    return [size, cost]


def machine_table(device: torch.device) -> Table:
    table = Table("machine", "")
    table.add_row(
        "device", torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    )
    for package in ("navit-kernels", "torch", "triton", "flash-attn-4", "flash-attn-3", "flash-attn"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            if package in ("torch", "triton"):
                table.add_row(package, "not installed")
    table.add_row("python", platform.python_version())
    table.add_row("CUDA of torch", torch.version.cuda or "none: a CPU build")
    return table


def kernel_table(device: torch.device, config: NaViTConfig) -> Table:
    """One line per op: what runs on this device, and where its launch parameters come from."""
    table = Table("op", "runs", "launch parameters")
    for folder in sorted(path.parent for path in OPS.glob("*/reference.py")):
        if device.type == "cpu":
            table.add_row(folder.name, "reference (plain torch)", "none on a CPU")
        elif not (folder / "kernel.py").exists():
            table.add_row(folder.name, "reference (plain torch)", "no kernel yet")
        elif importlib.util.find_spec("triton") is None:
            table.add_row(folder.name, "nothing", "triton is not installed")
        else:
            launches = list(_launches(folder.name, device, config))
            hopper = any("hopper" in launch for launch in launches)
            runs = "Triton kernels; hopper_: Hopper's own" if hopper else "Triton kernels"
            table.add_row(folder.name, runs, "\n".join(launches))
    return table


def _launches(op: str, device: torch.device, config: NaViTConfig) -> Iterable[str]:
    if op != "self_attention":
        return ["fixed in kernel.py"]
    from navit_kernels._jit import architecture, gluon_is_supported
    from navit_kernels.plan import CLASS_LIMITS, CLASSES
    from navit_kernels.self_attention.config import choose_config

    found = []
    for index in range(CLASSES):
        chosen = choose_config(architecture(device), config.width // config.heads, index, 16, gluon_is_supported())
        length = f"≤ {CLASS_LIMITS[index]}" if index < CLASSES - 1 else "longer"
        launches = {"forward": chosen.forward, "backward": chosen.backward, "backward of queries": chosen.queries}
        for direction, launch in launches.items():
            if launch is not None:
                found.append(f"{length} {direction}: {launch.kernel}, {launch.measured}")
    return found
