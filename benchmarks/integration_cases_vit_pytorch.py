"""vit-pytorch's NaViTs at the size of a B/16, before and after `accelerate`.

The nested one as shipped makes leaves of its tokens and pooling queries, so that nothing before them trains; here they
keep their history (`torch.nested.as_nested_tensor`), on both sides of the comparison the same gradients flow.
They run as shipped, uncompiled: a graph of theirs would unroll every image of one batch.
"after, compiled" is compiled for batches of any shape; the images are packed before it, in the time that is given.
"captured" is "after" as one CUDA graph, for a single image.
"""

import functools
from typing import Any

import torch
from integration_cases import Case, Grids, Side, kept
from model_baselines import vit_pytorch_module

from navit.graphs import Captured
from navit.integrations.vit_pytorch import accelerate

PATCH, TABLE = 16, 64  # pixels; rows of the position tables
BASE = {"dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, "dim_head": 64, "num_classes": 1000}
SMALL = {"dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "dim_head": 16, "num_classes": 10}


@kept
def models(nested: bool, device: str, small: bool) -> tuple[Any, Any, Any]:
    """Theirs, accelerated, and that compiled."""
    module = vit_pytorch_module(nested)
    torch.manual_seed(0)
    sizes = SMALL if small else BASE
    with torch.device(device):
        model = module.NaViT(
            image_size=TABLE * PATCH, patch_size=PATCH, token_dropout_prob=0.0 if nested else None, **sizes
        )
    for key, parameter in model.named_parameters():
        if key.endswith("q_norm.gamma"):  # scores up to 64, as they come, turn any rounding into another result
            parameter.data /= 8
    fast = accelerate(model)
    return model, fast, torch.compile(fast, dynamic=True)


def build(nested: bool, grids: Grids, device: str, small: bool) -> dict[str, Side]:
    model, fast, compiled = models(nested, device, small)
    torch.manual_seed(0)
    images = [torch.randn(3, rows * PATCH, columns * PATCH, device=device) for rows, columns in grids]
    group = {"group_images": True} if len(images) > 1 and not nested else {}  # in rows of at most 2,048 tokens
    sides = {
        "before": Side(model, lambda: model(images, **group)),
        "after": Side(fast, lambda: fast(images)),
    }
    if device == "cuda":
        sides["after, compiled"] = Side(fast, lambda: compiled(fast.pack(images)))
        if len(images) == 1:
            replay = functools.cache(lambda: Captured(fast, fast.pack(images)))  # under the step's autocast
            sides["captured"] = Side(fast, lambda: replay()(fast.pack(images)).clone(), directions=("forward",))
    return sides


CASES = {
    "vit_pytorch": Case(PATCH, functools.partial(build, False)),
    "vit_pytorch nested": Case(PATCH, functools.partial(build, True)),
}
