"""up, activation and down of a block's MLP, inference and training, against plain and compiled torch.

Widths and token counts of B/16, L/16 and So400m, bfloat16, no biases. Directions:
    fwd     forward without saved state
    train   forward and backward, all gradients; peak_mib: the most memory that adds to inputs, weights and cotangent

Floors, arithmetic alone: 2·T·E·(U + M) FLOPs forward, three times that for training; with recompute ours does 2·T·E·U
more, which its floor does not count. What the activation's passes would move in 16 bits, for scale: 2·(U + M)·T bytes
forward, and twice that plus 2·M·T backward.

T tokens, E model width, M MLP width, U hidden width (M, or 2M for "swiglu").
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
    peak_mib,
    print_table,
    sets_beyond_cache,
    without_gradients,
    write_results,
)
from torch import Tensor

from navit_kernels.mlp import feed_forward

OURS = "navit_kernels"
GATE_TOKENS, SMOKE_TOKENS = 1024, 32


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    width: int
    mlp_width: int
    activation: str = "gelu_tanh"

    @property
    def hidden_width(self) -> int:
        return self.mlp_width * (2 if self.activation == "swiglu" else 1)

    def flops(self, direction: str, tokens: int) -> int:
        forward = 2 * tokens * self.width * (self.hidden_width + self.mlp_width)
        return forward if direction == "fwd" else 3 * forward

    def inputs(self, tokens: int, device: str, seed: int = 0) -> "Inputs":
        randn = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(seed))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return Inputs(
            randn(tokens, self.width).to(dtype).requires_grad_(),
            (randn(self.hidden_width, self.width) * self.width**-0.5).to(dtype).requires_grad_(),
            (randn(self.width, self.mlp_width) * self.mlp_width**-0.5).to(dtype).requires_grad_(),
            randn(tokens, self.width).to(dtype),
        )


@dataclass(frozen=True)
class Inputs:
    x_TE: Tensor
    up_UE: Tensor
    down_EM: Tensor
    dout_TE: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x_TE, self.up_UE, self.down_EM]

    def double(self) -> "Inputs":
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return Inputs(leaves[0], leaves[1], leaves[2], self.dout_TE.double())


CASES = (
    Case("B/16", 65536, 768, 3072),
    Case("L/16", 32768, 1024, 4096),
    Case("So400m", 33024, 1152, 4304),
    Case("B/16", 65536, 768, 3072, "gelu"),
    Case("B/16", 65536, 768, 2048, "swiglu"),
)
Run = Callable[[Case, Inputs], Tensor]


# Contenders


def ours(case: Case, x: Inputs, **options: object) -> Tensor:
    return feed_forward(*x.leaves, activation=case.activation, **options)


def plain(function: Callable[..., Tensor], case: Case, x: Inputs) -> Tensor:
    return function(*x.leaves, activation=case.activation, backend="reference")


def contenders(device: str) -> dict[str, Run]:
    compiled = feed_forward if device == "cpu" else torch.compile(feed_forward, dynamic=False)
    return {
        OURS: ours,
        f"{OURS}_recompute": functools.partial(ours, recompute=True),
        "torch": functools.partial(plain, feed_forward),
        "torch_compile": functools.partial(plain, compiled),
    }


# Correctness and time


def outcome(run: Run, case: Case, x: Inputs) -> list[Tensor]:
    out_TE = run(case, x)
    return [out_TE.detach(), *torch.autograd.grad(out_TE, x.leaves, x.dout_TE.to(out_TE.dtype))]


def checks(case: Case, device: str) -> dict[str, Callable[[], None]]:
    x = case.inputs(SMOKE_TOKENS if device == "cpu" else GATE_TOKENS, device)
    reference = functools.partial(plain, feed_forward)
    return outcome_checks(contenders(device), OURS, reference, outcome, case, x)


def main() -> None:
    options = parse_options(parser(__doc__.splitlines()[0]))
    rows: list[Row] = []
    for case in CASES:
        torch._dynamo.reset()  # past a few recompilations of one function, torch.compile runs it eagerly
        gate(checks(case, options.device))
        tokens = SMOKE_TOKENS if options.smoke else case.tokens
        sets = [case.inputs(tokens, options.device, seed) for seed in range(sets_beyond_cache(2 * tokens * case.width))]
        about = {"case": case.name, "tokens": tokens, "width": case.width, "mlp_width": case.mlp_width,
                 "activation": case.activation, "dtype": "bf16"}  # fmt: skip
        for name, run in contenders(options.device).items():
            if name.endswith("recompute"):
                directions: tuple[tuple[str, Callable], ...] = (("train", outcome),)
            else:
                directions = (("fwd", without_gradients), ("train", outcome))
            for direction, once in directions:
                runs = [functools.partial(once, run, case, x) for x in sets]
                row: Row = {**about, "direction": direction, "contender": name}
                row["us"] = measure(runs, "events", options.milliseconds).us
                row["floor_us"] = ceilings().floor_us(0, case.flops(direction, tokens))
                row["peak_mib"] = peak_mib(runs[0]) if options.device == "cuda" else 0.0
                rows.append({**row, "timer": "events"})
    print_table(rows)
    write_results("mlp", rows, options)


if __name__ == "__main__":
    main()
