"""timm's NaFlexVits at the size of a B/16 before and after `accelerate`.

Before: the batch padded to its longest image, as timm's loader pads it, and compiled for exactly its shape. After: as
it is, and compiled for batches of any shape; patch_valid on the GPU as all else, so that each step waits for it once.
"valid on the CPU": as the loader left it, and nothing waits. "captured": that as one CUDA graph, for a single image.
"""

import copy
import functools
import importlib
from typing import Any

import peers
import torch
from integration_cases import Case, Grids, Side, kept
from torch import Tensor

from navit.graphs import Captured
from navit.integrations.timm import accelerate

PATCH = 16
MODELS = {"timm gap": "naflexvit_base_patch16_gap", "timm parfac_gap": "naflexvit_base_patch16_parfac_gap"}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def padded(grids: Grids) -> dict[str, Tensor]:
    """What timm's loader gives for images of these grids."""
    slots = max(rows * columns for rows, columns in grids)
    coords = torch.zeros(len(grids), slots, 2, dtype=torch.int64)
    valid = torch.zeros(len(grids), slots, dtype=torch.bool)
    for image, (rows, columns) in enumerate(grids):
        count = rows * columns
        coords[image, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(count, 2)
        valid[image, :count] = True
    patches = torch.randn(len(grids), slots, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


@kept
def models(name: str, device: str, small: bool) -> dict[str, tuple[Any, Any]]:
    """Theirs and ours, each with what runs it."""
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision's, where it does not load
        raise peers.PeerMissing(str(error)) from error
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(name, **(SMALL if small else {}))
    with torch.no_grad():  # a head and scales that are not almost zero, so that all gradients count
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    fast = accelerate(copy.deepcopy(model))
    if device != "cuda":
        return {"before": (model, model), "after": (fast, fast)}
    torch._dynamo.config.recompile_limit = 64  # a shape of the padded batch each
    return {
        "before": (model, torch.compile(model, dynamic=False)),
        "after": (fast, fast),
        "after, compiled": (fast, torch.compile(fast, dynamic=True)),
    }


def build(name: str, grids: Grids, device: str, small: bool) -> dict[str, Side]:
    given, made = padded(grids), models(name, device, small)
    batch = {key: tensor.to(device) for key, tensor in given.items()}
    sides = {side: Side(model, functools.partial(runs, batch)) for side, (model, runs) in made.items()}
    fast, _ = made["after"]
    with_lengths = {**batch, "patch_valid": given["patch_valid"]}
    sides["valid on the CPU"] = Side(fast, functools.partial(fast, with_lengths))
    if device == "cuda" and len(grids) == 1:
        replay = functools.cache(lambda: Captured(fast, with_lengths))  # under the step's autocast
        sides["captured"] = Side(fast, lambda: replay()(with_lengths).clone(), directions=("forward",))
    return sides


CASES = {label: Case(PATCH, functools.partial(build, name)) for label, name in MODELS.items()}
