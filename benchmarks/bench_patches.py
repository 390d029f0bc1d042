"""uint8 images of any sizes to packed bfloat16 patches, all of them or half, with and without a patch LayerNorm.

Directions:
    fwd        GPU time from a buffer on the GPU. torch_loop: image by image, sizes known on the host. torch_compile:
               one compiled gather, indices from the token's place, as a strong engineer would write it.
    list_gpu   wall time from the caller's list of GPU tensors, concatenation included
    list_cpu   wall time from the caller's list of CPU tensors, concatenation and host-to-device copies included

Floor: bytes T·P·(1 + 2), each kept pixel read once, each value written once in 16 bits. Copies from the host and
concatenation are not in it.

T tokens (kept patches), S images, C channels, P patch values.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import (
    Row,
    assert_same_function,
    ceilings,
    gate,
    measure,
    parse_options,
    parser,
    print_table,
    sets_beyond_cache,
    synchronize,
    write_results,
)
from torch import Tensor
from torch.nn.functional import layer_norm

from navit_kernels.patches import KeptPatches, PixelBuffer, patchify
from navit_kernels.testing import assert_error_within, cu_seqlens_of, image_grids

OURS = "navit_kernels"
TOKENS, GATE_TOKENS, SMOKE_TOKENS = 65536, 2048, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """name: a mix of image sizes, "50" behind it when half of each image's patches are kept."""

    name: str
    patch_size: int = 16
    norm: bool = False

    @property
    def values(self) -> int:
        return 3 * self.patch_size**2

    def inputs(self, tokens: int, device: str, seed: int = 0) -> "Inputs":
        half = self.name.endswith("50")
        grids = image_grids(self.name.removesuffix("50"), tokens * (1 + half), self.patch_size, seed)
        random = torch.Generator().manual_seed(seed)
        sides = [(rows * self.patch_size, columns * self.patch_size) for rows, columns in grids]
        images = [torch.randint(256, (3, *side), generator=random, dtype=torch.uint8).to(device) for side in sides]
        weight_P = torch.rand(self.values, generator=random).to(device)
        keep = kept_half(grids, random).to(device) if half else None
        return Inputs(images, PixelBuffer.from_images(images), keep, (weight_P, None, 1e-6) if self.norm else None)


@dataclass(frozen=True)
class Inputs:
    images: list[Tensor]
    buffer: PixelBuffer
    keep: KeptPatches | None
    norm: tuple[Tensor, None, float] | None


CASES = (Case("pt"), Case("ft"), Case("pt50"), Case("ft50"), Case("pt", norm=True), Case("ft", 14))
Run = Callable[[Case, Inputs], Tensor]


def kept_half(grids: list[tuple[int, int]], random: torch.Generator) -> KeptPatches:
    places, lengths = [], []
    for rows, columns in grids:
        kept = torch.randperm(rows * columns, generator=random)[: (rows * columns + 1) // 2].sort().values
        places.append(torch.stack([kept // columns, kept % columns], 1))
        lengths.append(len(kept))
    return KeptPatches(cu_seqlens_of(lengths), torch.cat(places).int())


# Contenders


def ours(case: Case, x: Inputs) -> Tensor:
    return patchify(x.buffer, case.patch_size, MEAN, STD, keep=x.keep, norm=x.norm, dtype=torch.bfloat16)


def ours_from_list(device: str, case: Case, x: Inputs) -> Tensor:
    buffer = PixelBuffer.from_images(x.images, pin_memory=device == "cuda").to(device, non_blocking=True)
    return patchify(buffer, case.patch_size, MEAN, STD, keep=x.keep, norm=x.norm, dtype=torch.bfloat16)


def torch_loop(starts: list[int] | None, constants: tuple[Tensor, Tensor], case: Case, x: Inputs) -> Tensor:
    """starts: the host's cu_seqlens where patches are dropped. constants: mean and std on the GPU."""
    p, packed = case.patch_size, []
    mean, std = constants
    for s, image in enumerate(x.images):
        rows, columns = image.shape[1] // p, image.shape[2] // p
        scaled = (image.to(mean.device, non_blocking=True).float() / 255 - mean) / std
        grid = scaled.view(3, rows, p, columns, p).permute(1, 3, 0, 2, 4)
        if x.keep is not None and starts is not None:
            row, column = x.keep.coords_T2[starts[s] : starts[s + 1]].unbind(1)
            packed.append(grid[row, column].reshape(-1, case.values))
        else:
            packed.append(grid.reshape(-1, case.values))
    patches_TP = torch.cat(packed)
    if x.norm is not None:
        patches_TP = layer_norm(patches_TP, (case.values,), *x.norm)
    return patches_TP.bfloat16()


def gather(
    pixels: Tensor, offsets_S: Tensor, sizes_S2: Tensor, cu_seqlens: Tensor | None, coords_T2: Tensor | None,
    mean: Tensor, std: Tensor, weight_P: Tensor | None, p: int,
) -> Tensor:  # fmt: skip
    values = 3 * p * p
    if cu_seqlens is None or coords_T2 is None:
        tokens = torch.arange(pixels.shape[0] // values, device=pixels.device)
        image_T = torch.searchsorted(offsets_S, tokens * values, right=True) - 1
        place_T, columns_T = tokens - offsets_S[image_T] // values, sizes_S2[image_T, 1] // p
        row_T, column_T = place_T // columns_T, place_T % columns_T
    else:
        tokens = torch.arange(coords_T2.shape[0], device=pixels.device, dtype=torch.int32)
        image_T = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        row_T, column_T = coords_T2.unbind(1)
    height_T, width_T = sizes_S2[image_T].long().unbind(1)
    first_T = offsets_S[image_T] + row_T * p * width_T + column_T * p
    value = torch.arange(values, device=pixels.device)
    line = (value // (p * p))[None] * height_T[:, None] + (value // p % p)[None]
    pixel = pixels[first_T[:, None] + line * width_T[:, None] + (value % p)[None]]
    patches_TP = ((pixel.view(-1, 3, p * p) / 255 - mean.view(3, 1)) / std.view(3, 1)).view(-1, values)
    if weight_P is not None:
        patches_TP = layer_norm(patches_TP, (values,), weight_P, None, 1e-6)
    return patches_TP.bfloat16()


def torch_gather(function: Callable[..., Tensor], constants: tuple[Tensor, Tensor], case: Case, x: Inputs) -> Tensor:
    keep = (None, None) if x.keep is None else (x.keep.cu_seqlens, x.keep.coords_T2)
    weight_P = None if x.norm is None else x.norm[0]
    buffer = x.buffer
    return function(buffer.pixels, buffer.offsets_S, buffer.sizes_S2, *keep, *constants, weight_P, case.patch_size)


def contenders(case: Case, x: Inputs, device: str) -> dict[str, tuple[Run, str]]:
    """{name: (run, timer)} from a buffer; the loop does not depend on which inputs it was made for but for starts."""
    compiled = gather if device == "cpu" else torch.compile(gather, dynamic=False)
    return {
        OURS: (ours, "graph"),
        "torch_compile": (functools.partial(torch_gather, compiled, constants_on(device)), "graph"),
        "torch_loop": (loop_of(x, device), "kernels"),
    }


def loop_of(x: Inputs, device: str) -> Run:
    starts = None if x.keep is None else x.keep.cu_seqlens.tolist()
    return functools.partial(torch_loop, starts, constants_on(device))


@functools.cache
def constants_on(device: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


# Correctness and time


def checks(case: Case, device: str) -> dict[str, Callable[[], None]]:
    x = case.inputs(SMOKE_TOKENS if device == "cpu" else GATE_TOKENS, device)
    reference = functools.partial(
        patchify, x.buffer, case.patch_size, MEAN, STD, keep=x.keep, norm=x.norm, backend="reference"
    )

    def check_ours() -> None:
        assert_error_within(ours(case, x), reference(dtype=torch.float64), reference(dtype=torch.bfloat16), OURS)

    def check(name: str, run: Run) -> None:
        assert_same_function(name, run(case, x), reference(dtype=torch.float64))

    others = {name: run for name, (run, _) in contenders(case, x, device).items() if name != OURS}
    others["from a list"] = functools.partial(ours_from_list, device)
    return {OURS: check_ours} | {name: functools.partial(check, name, run) for name, run in others.items()}


def main() -> None:
    options = parse_options(parser(__doc__.splitlines()[0]))
    device, tokens = options.device, SMOKE_TOKENS if options.smoke else TOKENS
    rows: list[Row] = []
    for case in CASES:
        torch._dynamo.reset()  # past a few recompilations of one function, torch.compile runs it eagerly
        gate(checks(case, device))
        first = case.inputs(tokens, device)
        sum_of_bytes = 3 * ours(case, first).numel()
        sets = [first, *(case.inputs(tokens, device, seed) for seed in range(1, sets_beyond_cache(sum_of_bytes)))]
        about = {"case": case.name, "patch_size": case.patch_size, "norm": case.norm, "dtype": "bf16"}
        floor_us = ceilings().floor_us(sum_of_bytes)

        def add(direction: str, name: str, us: float, timer: str) -> None:
            row = {"direction": direction, "contender": name, "us": us, "floor_us": floor_us, "timer": timer}  # noqa: B023
            rows.append({**about, **row})  # noqa: B023

        for name, (run, timer) in contenders(case, first, device).items():
            runs = [functools.partial(run, case, x) for x in sets]
            if name != OURS:  # shapes differ from set to set: one set for what compiles or loops over shapes
                runs = runs[:1]
            add("fwd", name, measure(runs, timer, options.milliseconds).us, timer)
        for direction, where in (("list_gpu", device), ("list_cpu", "cpu")):
            x = Inputs([image.to(where) for image in first.images], first.buffer, first.keep, first.norm)
            for name, run in ((OURS, functools.partial(ours_from_list, device)), ("torch_loop", loop_of(x, device))):

                def to_the_end(run: Run = run, x: Inputs = x) -> None:
                    run(case, x)  # noqa: B023
                    synchronize()

                add(direction, name, measure([to_the_end], "clock", 10 * options.milliseconds).us, "clock")
    print_table(rows)
    write_results("patches", rows, options)


if __name__ == "__main__":
    main()
