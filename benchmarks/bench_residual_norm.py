"""x + branch and the next norm, forward and backward, against plain and compiled torch.

Widths and token counts of B/16, L/16 and So400m; float32 parameters; branch and normed in bfloat16.

Floors, for T·E elements, sx bytes each in the residual stream and 2 in the branch; vectors are small:
    forward    read x and branch, write x and normed: 2·sx + 4
    backward   read dx, x and dnormed, write dx: 3·sx + 2; where dbranch differs from dx, by a scale or in dtype, write
               it: 2 more; with a layer scale, read branch: 2 more
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import (
    Row,
    ceilings,
    gate,
    measure,
    outcome_checks,
    parse_options,
    parser,
    print_table,
    sets_beyond_cache,
    without_gradients,
    write_results,
)
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from navit_kernels.residual_norm import add_norm
from navit_kernels.testing import cu_seqlens_of, image_lengths

OURS = "navit_kernels"
GATE_TOKENS, SMOKE_TOKENS = 2048, 64
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    width: int
    residual: torch.dtype = torch.bfloat16
    kind: str = "layer_norm"
    bias: bool = False
    layer_scale: bool = False
    keep: bool = False

    def inputs(self, tokens: int, device: str, seed: int = 0) -> "Inputs":
        randn = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(seed))
        lengths = image_lengths("pt", tokens)
        lengths[-1] -= sum(lengths) - tokens
        return Inputs(
            randn(tokens, self.width).to(self.residual).requires_grad_(),
            randn(tokens, self.width).bfloat16().requires_grad_(),
            randn(self.width).requires_grad_(),
            randn(self.width).requires_grad_() if self.bias else None,
            randn(self.width).requires_grad_() if self.layer_scale else None,
            randn(len(lengths)).gt(-1.0) / 0.84 if self.keep else None,
            cu_seqlens_of(lengths, device),
            (randn(tokens, self.width).to(self.residual), randn(tokens, self.width).bfloat16()),
        )

    def bytes_moved(self, direction: str) -> int:
        size = self.residual.itemsize
        if direction == "fwd":
            return 2 * size + 4
        own_dbranch = self.layer_scale or self.keep or self.residual != torch.bfloat16
        return 3 * size + 2 + 2 * own_dbranch + 2 * self.layer_scale


@dataclass(frozen=True)
class Inputs:
    x_TE: Tensor
    branch_TE: Tensor
    weight_E: Tensor
    bias_E: Tensor | None
    layer_scale_E: Tensor | None
    keep_scale_S: Tensor | None
    cu_seqlens: Tensor
    cotangents: tuple[Tensor, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.x_TE, self.branch_TE, self.weight_E, self.bias_E, self.layer_scale_E)
        return [tensor for tensor in tensors if tensor is not None]

    def double(self) -> "Inputs":
        parts = (self.x_TE, self.branch_TE, self.weight_E, self.bias_E, self.layer_scale_E)
        leaves = (None if part is None else part.detach().double().requires_grad_() for part in parts)
        cotangents = self.cotangents[0].double(), self.cotangents[1].double()
        return Inputs(*leaves, self.keep_scale_S, self.cu_seqlens, cotangents)


BF16, FP32 = torch.bfloat16, torch.float32
CASES = (
    Case("B/16", 65536, 768),
    Case("L/16", 32768, 1024),
    Case("So400m", 33024, 1152),
    Case("B/16", 65536, 768, FP32),
    Case("B/16", 65536, 768, kind="rms_norm"),
    Case("So400m", 33024, 1152, bias=True),
    Case("L/16", 32768, 1024, keep=True),
    Case("L/16", 32768, 1024, layer_scale=True, keep=True),
)
Run = Callable[[Case, Inputs], tuple[Tensor, Tensor]]


# Contenders


def ours(case: Case, x: Inputs, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return add_norm(
        x.x_TE, x.branch_TE, x.weight_E, x.bias_E, kind=case.kind, eps=EPS, layer_scale_E=x.layer_scale_E,
        keep_scale_S=x.keep_scale_S, cu_seqlens=x.cu_seqlens, backend=backend,
    )  # fmt: skip


def plain(
    kind: str, x_TE: Tensor, branch_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, layer_scale_E: Tensor | None,
    keep_scale_S: Tensor | None, cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, width = branch_TE.dtype, weight_E.shape
    if layer_scale_E is not None:
        branch_TE = branch_TE * layer_scale_E.to(dtype)
    if keep_scale_S is not None:
        keep_T = torch.repeat_interleave(keep_scale_S, cu_seqlens.diff(), output_size=len(x_TE))
        branch_TE = branch_TE * keep_T[:, None].to(dtype)
    x_TE = x_TE + branch_TE
    weight_E = weight_E.to(x_TE.dtype)
    if kind == "rms_norm":
        return x_TE, rms_norm(x_TE, width, weight_E, EPS).to(dtype)
    return x_TE, layer_norm(x_TE, width, weight_E, None if bias_E is None else bias_E.to(x_TE.dtype), EPS).to(dtype)


def peer(function: Callable[..., tuple[Tensor, Tensor]], case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    return function(case.kind, x.x_TE, x.branch_TE, x.weight_E, x.bias_E, x.layer_scale_E, x.keep_scale_S, x.cu_seqlens)


def contenders(device: str) -> dict[str, Run]:
    compiled = plain if device == "cpu" else torch.compile(plain, dynamic=False)
    return {OURS: ours, "torch": functools.partial(peer, plain), "torch_compile": functools.partial(peer, compiled)}


# Correctness and time


def outcome(run: Run, case: Case, x: Inputs) -> list[Tensor]:
    outputs = run(case, x)
    cotangents = [cotangent.to(output.dtype) for cotangent, output in zip(x.cotangents, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, x.leaves, cotangents)]


def checks(case: Case, device: str) -> dict[str, Callable[[], None]]:
    x = case.inputs(SMOKE_TOKENS if device == "cpu" else GATE_TOKENS, device)
    reference = functools.partial(ours, backend="reference")
    return outcome_checks(contenders(device), OURS, reference, outcome, case, x)


def main() -> None:
    options = parse_options(parser(__doc__.splitlines()[0]))
    rows: list[Row] = []
    for case in CASES:
        torch._dynamo.reset()  # past a few recompilations of one function, torch.compile runs it eagerly
        gate(checks(case, options.device))
        tokens = SMOKE_TOKENS if options.smoke else case.tokens
        elements = tokens * case.width
        sets = [case.inputs(tokens, options.device, seed) for seed in range(sets_beyond_cache(4 * elements))]
        about = {"case": case.name, "tokens": tokens, "width": case.width, "norm": case.kind, "bias": case.bias,
                 "residual": str(case.residual).removeprefix("torch."), "layer_scale": case.layer_scale,
                 "keep_scale": case.keep}  # fmt: skip
        for name, run in contenders(options.device).items():
            timer = "graph" if name == OURS else "kernels"  # compiled peers: without the gaps between their kernels
            forwards = [functools.partial(without_gradients, run, case, x) for x in sets]
            backwards = [
                functools.partial(torch.autograd.grad, run(case, x), x.leaves, x.cotangents, retain_graph=True)
                for x in sets
            ]
            for direction, runs in (("fwd", forwards), ("bwd", backwards)):
                us = measure(runs, timer, options.milliseconds).us
                floor_us = ceilings().floor_us(case.bytes_moved(direction) * elements)
                rows.append(
                    {**about, "direction": direction, "contender": name, "us": us, "floor_us": floor_us, "timer": timer}
                )
    print_table(rows)
    write_results("residual_norm", rows, options)


if __name__ == "__main__":
    main()
