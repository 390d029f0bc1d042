"""What tests and benchmarks share: image-size mixes, input makers, and the one error bound of this project."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

SIDES = {"pt": (64, 256), "ft": (224, 512), "hr": (512, 1024), "doc": (1024, 2048)}  # pixels


def image_grids(mix: str, tokens: int, patch_size: int = 16, seed: int = 0) -> list[tuple[int, int]]:
    """Draw (rows, columns) of patches, image by image, until they hold at least `tokens` patches.

    A side is uniform over SIDES[mix] in pixels, an aspect ratio log-uniform in [1/2, 2].
    """
    low, high = SIDES[mix]
    rng = random.Random(seed)
    grids: list[tuple[int, int]] = []
    drawn = 0
    while drawn < tokens:
        side = rng.uniform(low, high)
        aspect = math.exp(rng.uniform(-math.log(2), math.log(2)))
        rows = max(1, round(side * math.sqrt(aspect) / patch_size))
        columns = max(1, round(side / math.sqrt(aspect) / patch_size))
        grids.append((rows, columns))
        drawn += rows * columns
    return grids


def image_lengths(case: str, tokens: int = 65536, patch_size: int = 16, seed: int = 0) -> list[int]:
    """Tokens per image of a benchmark case: "U256" (all 256), a mix of SIDES, or "pt50" (half of pt's tokens kept)."""
    if case.startswith("U"):
        length = int(case[1:])
        return [length] * (tokens // length)
    if case == "pt50":
        return [max(1, rows * columns // 2) for rows, columns in image_grids("pt", 2 * tokens, patch_size, seed)]
    return [rows * columns for rows, columns in image_grids(case, tokens, patch_size, seed)]


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Cumulative lengths, int32 (S + 1,), starting at 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


def relative_errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """‖actual − exact‖ / ‖exact‖ and max|actual − exact| / max|exact|, in float64; NaN counts as infinite."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    if actual.shape != exact.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(exact.shape)}")
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = actual - exact
    if not torch.isfinite(difference).all():
        return math.inf, math.inf
    pairs = ((difference.norm(), exact.norm()), (difference.abs().max(), exact.abs().max()))
    norm, peak = (0.0 if error == 0 else (error / size).item() if size > 0 else math.inf for error, size in pairs)
    return norm, peak


def mean_errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """relative_errors, each the mean over draws."""
    norms, peaks = zip(*(relative_errors(a, e) for a, e in zip(actual, exact, strict=True)), strict=True)
    return sum(norms) / len(norms), sum(peaks) / len(peaks)


def assert_error_within(
    actual: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    at_dtype: Tensor | Sequence[Tensor],
    name: str = "result",
) -> None:
    """Assert err(actual) ≤ 2·err(at_dtype) + 1 ulp of actual's dtype, for the 2-norm and for the largest element.

    actual: the kernel's result. exact: the reference in float64. at_dtype: the reference run at the kernel's dtype.
    Each may be a list, of one result per draw of the inputs: the mean errors are judged then. One draw's largest error
    is luck in float32, where kernel and reference err alike: the reference with its sums in another order exceeds its
    own bound in 1 to 5 draws of 100. A reference that is not finite bounds nothing, and fails.
    """
    actual, exact, at_dtype = ([x] if isinstance(x, Tensor) else x for x in (actual, exact, at_dtype))
    ulp = torch.finfo(actual[0].dtype).eps
    for kind, ours, theirs in zip(
        ("‖·‖", "max"), mean_errors(actual, exact), mean_errors(at_dtype, exact), strict=True
    ):
        bound = 2 * theirs + ulp
        if not ours <= bound < math.inf:
            raise AssertionError(f"{name}: {kind} error {ours:.2e} is over {bound:.2e} (reference: {theirs:.2e})")
