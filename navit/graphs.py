"""Packs of fixed shapes, and CUDA graphs that take them.

A CUDA graph replays launches as they were recorded, so all shapes must stay. `pad_pack` gives every pack the shapes of
its budgets; `Captured` records a function of such packs once and replays it for others, without Python, dispatch or
launches in between:

    packs = pack(images, 4096, image_budget=64, **model.config.pack_options)
    packs = [pad_pack(packed, image_budget=64).to("cuda") for packed in packs]
    with torch.no_grad():
        forward = Captured(model.eval(), packs[0])
    rows = [forward(packed)[: len(packed)].clone() for packed in packs]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from navit_kernels import plan_pack
from navit_kernels._checks import fail
from navit_kernels.patches import PixelBuffer

from .packing import PackedImages

WARM_UPS = 3  # calls before the recording, in which kernels compile and libraries allocate


def pad_pack(packed: PackedImages, image_budget: int, token_drop: float = 0.0) -> PackedImages:
    """The same images in a pack of token_budget patches and image_budget + 1 segments, on the CPU.

    Behind the images come segments of padding that share what is left of the tokens; their patches are black. No image
    sees them, and the model gives no rows for them.

    packed: with pixels, packed under a token budget. image_budget: images per pack at most.
    token_drop: the highest rate at which tokens of images were dropped: it decides how many pixels whole images may
        bring.
    Raises ValueError for a pack that exceeds a budget.
    """
    budget, pixels = packed.token_budget, packed.pixels
    if budget is None or pixels is None:
        fail("packed", "of pixels, under a token budget", f"a token_budget of {budget}, pixels {pixels}")
    values = pixels.channels * packed.patch_size**2
    pixel_budget = values * math.floor((budget + image_budget * (token_drop > 0) / 2) / (1 - token_drop))
    used, count = pixels.pixels.shape[0], packed.coords.shape[0]
    for name, got, most in (("images", len(packed), image_budget), ("pixel values", used, pixel_budget)):
        if got > most:
            fail(f"{name} of a pack", f"at most {most}, the budget", got)
    extra = image_budget + 1 - len(packed)
    padding = [(budget - count + place) // extra for place in range(extra)]  # as even as can be
    lengths = [*packed.cu_seqlens.diff().tolist(), *padding]
    black = PixelBuffer(
        pad(pixels.pixels, (0, pixel_budget + values - used)),
        pad(pixels.offsets_S, (0, extra), value=used),
        pad(pixels.sizes_S2, (0, 0, 0, extra), value=packed.patch_size),
        pixels.channels,
    )
    return replace(
        packed,
        pixels=black,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        coords=pad(packed.coords, (0, 0, 0, budget - count)),
        grids=pad(packed.grids, (0, 0, 0, extra), value=1),
        plan=plan_pack([length + packed.prefix_tokens for length in lengths]),
        padded=True,
    )


class Captured:
    """A function recorded once as a CUDA graph, then replayed for other inputs of the same shapes.

    run: takes tensors, and packs made by `pad_pack`, on one GPU. It must not wait for the GPU. Every segment of a pack
        is an image to it, so that a model gives rows for padding too: cut them off.
    example: what run takes; run is called with it a few times before it is recorded. Tensors on the CPU, such as a
        patch_valid without padding, are part of what is recorded: calls must bring the same values.

    A call copies its inputs, replays and returns what run returned, in memory that the next call writes again. Raises
    ValueError for inputs of other shapes, or of other values on the CPU, than were recorded.
    """

    def __init__(self, run: Callable[..., Any], *example: Any) -> None:
        leaves, self.structure = tree_flatten(_fixed(example))
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(self.inputs, self.structure)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = run(*arguments)

    def __call__(self, *inputs: Any) -> Any:
        leaves, structure = tree_flatten(_fixed(inputs))
        recorded, given = ([_kind(leaf) for leaf in leaves] for leaves in (self.inputs, leaves))
        if (structure, given) != (self.structure, recorded):
            different = [pair for pair in zip(recorded, given, strict=False) if pair[0] != pair[1]]
            fail("inputs", "of the shapes and dtypes recorded", f"(recorded, given) = {different[:1]}")
        for mine, theirs in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor) and mine.device.type == "cpu":
                if not torch.equal(mine, theirs.cpu()):
                    fail("inputs", f"with the values recorded of a CPU tensor {tuple(mine.shape)}", "others")
            elif isinstance(mine, Tensor):
                mine.copy_(theirs, non_blocking=True)
        self.graph.replay()
        return self.outputs


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _fixed(inputs: Any) -> Any:
    """Packs without what differs from pack to pack on the host: how many images there are, and the launches planned."""

    def fixed(part: Any) -> Any:
        if not isinstance(part, PackedImages):
            return part
        order = pad(part.order, (0, part.segments - len(part)), value=-1)
        plan = None if part.plan is None else part.plan.without_host_offsets()
        return replace(part, order=order, plan=plan, padded=False)

    return tree_map(fixed, inputs, is_leaf=lambda part: isinstance(part, PackedImages))
