"""The search behind navit_kernels/mlp/kernel.py's table: launch variants of both Hopper kernels, beside torch.

    python benchmarks/search_mlp.py --prepare               # compile all variants side by side, into Triton's cache
    python benchmarks/search_mlp.py --out search.json       # time them, one after the other

"product" is torch's product alone, "torch" it and its passes for the activation. A variant that is off from torch by
more than 16-bit rounding is reported as wrong.
"""

import argparse
import functools
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace

import torch
from bench_mlp import CASES, Case
from harness import measure, parse_options, parser, print_table
from torch import Tensor
from torch.nn.functional import linear

from navit_kernels.mlp import hopper_kernel, kernel

UP = (16, 32)  # chunk
DOWN = ((16, 1), (16, 2), (8, 2), (8, 3), (8, 4), (8, 6))  # chunk, ahead
TOKENS_TO_COMPILE = 256
Variant = tuple[str, tuple[int, ...]]
VARIANTS: list[Variant] = [("up", (chunk,)) for chunk in UP] + [("down", pair) for pair in DOWN]


class Buffers:
    """Inputs and results of both kernels."""

    def __init__(self, case: Case, tokens: int, dtype: torch.dtype) -> None:
        x = case.inputs(tokens, "cuda")
        self.activation = case.activation
        self.x_TE, self.up_UE, self.down_EM, self.dout_TE = (part.detach().to(dtype) for part in (*x.leaves, x.dout_TE))
        self.hidden_TU = linear(self.x_TE, self.up_UE)
        self.written_TU = torch.empty_like(self.hidden_TU)
        self.act_TM = self.x_TE.new_empty(tokens, case.mlp_width)

    def run(self, variant: Variant) -> list[Tensor]:
        which, numbers = variant
        if which == "up":
            hopper_kernel.up(self.x_TE, self.up_UE, None, self.written_TU, self.act_TM, self.activation, *numbers)
        else:
            hopper_kernel.down_backward(
                self.dout_TE,
                self.down_EM,
                self.hidden_TU,
                self.act_TM,
                self.written_TU,
                None,
                self.activation,
                *numbers,
            )
        return [self.written_TU, self.act_TM]

    def product(self, which: str) -> Tensor:
        return linear(self.x_TE, self.up_UE) if which == "up" else self.dout_TE @ self.down_EM

    def torch(self, which: str) -> list[Tensor]:
        product = self.product(which)
        if which == "up":
            return [product, kernel._activate_torch(product, self.activation)]
        dhidden_TU = kernel._activate_backward_torch(product, self.hidden_TU, self.activation)
        return [dhidden_TU, kernel._activate_torch(self.hidden_TU, self.activation)]


def compile_variant(case: Case, dtype: torch.dtype, variant: Variant) -> None:
    try:
        Buffers(case, TOKENS_TO_COMPILE, dtype).run(variant)
    except Exception as error:  # reported where it is timed
        print(f"{case.name} {case.activation} {variant}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        ((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in zip(actual, expected, strict=True)
    )


def times(case: Case, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    buffers = Buffers(case, case.tokens, dtype)
    about = {"case": case.name, "activation": case.activation, "dtype": str(dtype).removeprefix("torch.")}
    rows = []
    for which in ("up", "down"):
        runs: dict[str, Callable[[], object]] = {
            "product": functools.partial(buffers.product, which), "torch": functools.partial(buffers.torch, which)
        }  # fmt: skip
        expected = buffers.torch(which)
        wrong = {}
        for variant in [variant for variant in VARIANTS if variant[0] == which]:
            name = " ".join(map(str, variant[1]))
            try:
                wrong[name] = difference(buffers.run(variant), expected) > 0.01
            except Exception as error:  # too large for the machine
                rows.append({**about, "kernel": which, "variant": name, "us": str(error)[:60], "us again": ""})
                continue
            runs[name] = functools.partial(buffers.run, variant)
        us = [{name: measure([run], "graph", options.milliseconds).us for name, run in runs.items()} for _ in range(2)]
        for name in runs:
            row = {**about, "kernel": which, "variant": name, "us": us[0][name], "us again": us[1][name]}
            rows.append({**row, "wrong": wrong.get(name, False)})
    return rows


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--cases", nargs="*", default=[case.name for case in CASES])
    options.add_argument("--prepare", action="store_true", help="compile, and time nothing")
    options = parse_options(options)
    wanted = [(case, torch.bfloat16) for case in CASES if case.name in options.cases]
    wanted += [(replace(case, activation="gelu_tanh"), torch.float16) for case, _ in wanted[:1]]
    if options.prepare:
        jobs = [(case, dtype, variant) for case, dtype in wanted for variant in VARIANTS]
        with multiprocessing.get_context("spawn").Pool(14) as pool:
            pool.starmap(compile_variant, jobs, chunksize=1)
        return
    rows = [row for case, dtype in wanted for row in times(case, dtype, options)]
    print_table(rows)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
