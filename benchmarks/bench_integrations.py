"""Published models before and after an integration takes them: the same weights, the same images, one row each.

Cases come from the files integration_cases_*.py; integration_cases.py says what one holds.

ms: median wall clock of one step, the host's work included. Steps of many images are timed in pairs without waiting in
    between, as in a training loop; a single image is waited for, so that its time is its latency.
Weights are float32 under bf16 autocast unless a side says otherwise. "forward" saves nothing for a backward, "train" is
forward and backward. peak_gib: the most memory allocated during a step, weights included.
"""

import contextlib
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import peers
import torch
from harness import Row, assert_same_function, gate, parse_options, parser, print_table, synchronize, write_results
from integration_cases import DIRECTIONS, IMAGES, Case, Grids, Side, all_cases, forget
from torch import Tensor

from navit_kernels.testing import image_grids

TOKENS = 32768  # at least, of the mixes
LIMIT = 0.05  # relative difference without autocast, of outputs and of all gradients together


def grids_of(images: str, patch_size: int) -> Grids:
    if images in ("1k", "4k"):
        side = 32 if images == "1k" else 64
        return [(side, side)]
    return image_grids(images, TOKENS, patch_size)


def step_of(side: Side, direction: str, device: str) -> Callable[[], Tensor]:
    """One step; gives the output."""
    autocast = device == "cuda" and side.autocast
    parameters = list(side.model.parameters())

    def step() -> Tensor:
        with torch.set_grad_enabled(direction == "train"):
            with torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext():
                out = side.run()
            if direction == "train":
                for parameter in parameters:  # as an optimizer's zero_grad
                    parameter.grad = None
                out.backward(direction_of(out))
        return out.detach()

    return step


@functools.lru_cache(maxsize=4)
def _direction(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def direction_of(out: Tensor) -> Tensor:
    """The gradient that every side gets."""
    return _direction(tuple(out.shape), out.dtype, str(out.device))


def outcome(side: Side, directions: Sequence[str], device: str) -> dict[str, Tensor]:
    """The output in evaluation mode and, where the side trains, the gradient of every parameter."""
    side.model.eval()
    result = {"output": step_of(side, "forward", device)()}
    if "train" in directions:
        side.model.train()
        step_of(side, "train", device)()
        result |= {name: p.grad.clone() for name, p in side.model.named_parameters() if p.grad is not None}
        side.model.zero_grad(set_to_none=True)
    return result


def check(name: str, before: Side, after: Side, directions: Sequence[str], device: str) -> None:
    """Both sides give the same output and the same gradients.

    Under autocast each is compared with `before` in float32, and may be twice as far from it as `before` in 16 bits.
    """
    results = [outcome(side, directions, device) for side in (before, after)]
    autocast = device == "cuda" and before.autocast and after.autocast
    exact = outcome(before._replace(autocast=False), directions, device) if autocast else results[0]
    trained = sorted((results[0].keys() & results[1].keys()) - {"output"})
    if "train" in directions and not trained:
        raise AssertionError(f"{name}: no parameter has the same name on both sides")
    for what, keys in {"output": ["output"], **({"gradients": trained} if trained else {})}.items():
        theirs, ours, expected = (torch.cat([part[k].flatten().double() for k in keys]) for part in (*results, exact))
        limit = 0.01 + 2 * float((theirs - expected).norm() / expected.norm()) if autocast else LIMIT
        assert_same_function(f"{name} {what}", ours, expected, limit)


def time_step(step: Callable[[], Any], steps: int, milliseconds: float) -> float:
    """Median ms of one of `steps` steps in a row; of three rows at least, of five where they are short."""
    for _ in range(2):
        step()
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 100:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        samples.append(1e3 * (time.perf_counter() - start) / steps)
        spent = time.perf_counter() - began
        if len(samples) >= (5 if spent < 4 else 3) and spent > milliseconds / 1e3:
            break
    return statistics.median(samples)


def time_side(side: Side, direction: str, grids: Grids, options: Any) -> Row:
    side.model.train(direction == "train")
    step, peak_gib = step_of(side, direction, options.device), 0.0
    ms = time_step(step, 1 if len(grids) == 1 else 2, options.milliseconds)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
    side.model.zero_grad(set_to_none=True)
    tokens = sum(rows * columns for rows, columns in grids)
    per_second = {"images_per_s": len(grids) / ms * 1e3, "tokens_per_s": tokens / ms * 1e3}
    return {"ms": ms, **per_second, "peak_gib": peak_gib, "timer": "clock"}


def speedups(rows: list[Row]) -> list[Row]:
    """Per case, images and direction: the first side's time over every other's."""
    table: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        table.setdefault((row["case"], row["images"], row["direction"]), {})[row["contender"]] = row["ms"]
    lines = []
    for (case, images, direction), ms in table.items():
        first = next(iter(ms))
        times = {f"× {name}": f"{ms[first] / value:.2f}" for name, value in ms.items() if name != first}
        lines.append({"case": case, "images": images, "direction": direction, f"ms {first}": ms[first], **times})
    return lines


def clear(device: str, all_of_it: bool = False) -> None:
    """Leave nothing of some images to the next ones, nor (all_of_it) of one case to the next."""
    if all_of_it:
        forget()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
    _direction.cache_clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    cases = all_cases()
    options = parser(__doc__.splitlines()[0])
    listed: dict[str, Any] = {"type": lambda text: text.split(",")}
    options.add_argument("--cases", **listed, default=list(cases), help="by default all")
    options.add_argument("--images", **listed, default=list(IMAGES))
    options.add_argument("--directions", **listed, default=list(DIRECTIONS))
    options.add_argument("--contenders", **listed, help="beside each case's first; by default all")
    options = parse_options(options, arguments)
    rows: list[Row] = []

    def build(case: Case, grids: Grids) -> dict[str, Side]:
        first, *others = case.build(grids, options.device, options.smoke).items()
        return dict([first, *(side for side in others if options.contenders is None or side[0] in options.contenders)])

    for name in options.cases:
        case = cases[name]
        directions = [way for way in options.directions if way in case.directions]
        try:
            sides = build(case, [(3, 5), (1, 1), (8, 4), (2, 7)])
        except peers.PeerMissing as error:
            print(f"without {name}: {error}")
            continue
        before, *others = sides
        gate({f"{name} {o}": functools.partial(check, o, sides[before], sides[o], directions, options.device)
              for o in others})  # fmt: skip
        for images in [part for part in options.images if part in case.images]:
            grids = [(4, 4), (2, 3)] if options.smoke else grids_of(images, case.patch_size)
            del sides
            clear(options.device)
            sides = build(case, grids)
            for direction in directions:
                able = {contender: side for contender, side in sides.items() if direction in side.directions}
                for contender, side in able.items():
                    if time.monotonic() > options.deadline:
                        print(f"{name} {images} {direction}: no time left for {contender}")
                        continue
                    row = {"case": name, "images": images, "direction": direction, "contender": contender}
                    try:
                        rows.append({**row, **time_side(side, direction, grids, options)})
                    except torch.OutOfMemoryError:
                        print(f"{name} {images} {direction}: not enough memory for {contender}")
                        clear(options.device)
        del sides
        clear(options.device, all_of_it=True)
    print_table(rows)
    print_table(speedups(rows))
    write_results("integrations", rows, options)


if __name__ == "__main__":
    main()
