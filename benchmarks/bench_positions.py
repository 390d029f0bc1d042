"""LayerNorm of the patch embedding + height row + width row, forward and backward, against plain and compiled torch.

bfloat16 embeddings, float32 norm parameters and tables of 64 rows (96 for the hr mix); an image's tokens from the top
row down, or in random order. Backward means the gradients of the embeddings, both tables and the norm's weight.

Floors, for T tokens of E bfloat16 channels; tables are small:
    forward    bytes 4·T·E, read x and write y, and 8·T coordinates
    backward   bytes 6·T·E with a norm (read dy and x, write dx), 2·T·E without (read dy, which is dx)

torch_index looks rows up with table[rows], eagerly; torch_embedding_compiled with F.embedding, compiled, the best that
stock parts make.
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
from torch.nn.functional import embedding, layer_norm

from navit_kernels.positions import add_positions
from navit_kernels.testing import image_grids

OURS = "navit_kernels"
TOKENS, GATE_TOKENS, SMOKE_TOKENS = 65536, 2048, 64


@dataclass(frozen=True)
class Case:
    """name: a mix of image sizes, or "random" for the pt mix in random order."""

    name: str
    width: int = 768
    combine: str = "sum"
    coords: str = "int"
    norm: bool = True

    def inputs(self, tokens: int, device: str, seed: int = 0) -> "Inputs":
        grids = image_grids("pt" if self.name == "random" else self.name, tokens, seed=seed)
        places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids]
        coords_T2 = torch.cat(places)[:tokens].int()
        random = torch.Generator(device).manual_seed(seed)
        if self.name == "random":
            coords_T2 = coords_T2[torch.randperm(tokens)]
        if self.coords == "float":
            coords_T2 = coords_T2 * 0.999 + 0.1
        table_rows = 96 if self.name == "hr" else 64
        randn = functools.partial(torch.randn, generator=random, device=device)
        width = self.width // 2 if self.combine == "concat" else self.width
        return Inputs(
            randn(tokens, self.width).bfloat16().requires_grad_(),
            coords_T2.to(device),
            randn(table_rows, width).requires_grad_(),
            randn(table_rows, width).requires_grad_(),
            randn(self.width).requires_grad_() if self.norm else None,
            randn(tokens, self.width).bfloat16(),
        )


@dataclass(frozen=True)
class Inputs:
    x_TE: Tensor
    coords_T2: Tensor
    row_table_LE: Tensor
    column_table_LE: Tensor
    weight_E: Tensor | None
    dy_TE: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.x_TE, self.row_table_LE, self.column_table_LE, self.weight_E)
        return [tensor for tensor in tensors if tensor is not None]

    def double(self) -> "Inputs":
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        coords_T2 = self.coords_T2.double() if self.coords_T2.is_floating_point() else self.coords_T2
        weight_E = None if self.weight_E is None else leaf(self.weight_E)
        tables = leaf(self.row_table_LE), leaf(self.column_table_LE)
        return Inputs(leaf(self.x_TE), coords_T2, *tables, weight_E, self.dy_TE.double())


CASES = (
    Case("pt"),
    Case("ft"),
    Case("random"),
    Case("hr", 1152),
    Case("pt", norm=False),
    Case("pt", combine="concat"),
    Case("pt", combine="product"),
    Case("pt", coords="float"),
)
Run = Callable[[Case, Inputs], Tensor]


# Contenders


def ours(case: Case, x: Inputs, backend: str = "auto") -> Tensor:
    norm = None if x.weight_E is None else (x.weight_E, None, 1e-6)
    return add_positions(
        x.x_TE, x.coords_T2, x.row_table_LE, x.column_table_LE, combine=case.combine, norm=norm, backend=backend
    )


def plain(
    look_up: Callable[[Tensor, Tensor], Tensor], combine: str, x_TE: Tensor, coords_T2: Tensor, row_table_LE: Tensor,
    column_table_LE: Tensor, weight_E: Tensor | None,
) -> Tensor:  # fmt: skip
    y_TE = x_TE.float()
    if weight_E is not None:
        y_TE = layer_norm(y_TE, (y_TE.shape[1],), weight_E, None, 1e-6)
    found = []
    for table_LE, coords_T in ((row_table_LE, coords_T2[:, 0]), (column_table_LE, coords_T2[:, 1])):
        if coords_T.is_floating_point():
            below_T = coords_T.long()
            fraction_T1 = (coords_T - below_T)[:, None]
            found.append(torch.lerp(look_up(table_LE, below_T), look_up(table_LE, below_T + 1), fraction_T1))
        else:
            found.append(look_up(table_LE, coords_T))
    rows_TE, columns_TE = found
    if combine == "concat":
        return (y_TE + torch.cat([rows_TE, columns_TE], 1)).to(x_TE.dtype)
    return (y_TE + (rows_TE * columns_TE if combine == "product" else rows_TE + columns_TE)).to(x_TE.dtype)


def index(table_LE: Tensor, rows_T: Tensor) -> Tensor:
    return table_LE[rows_T]


def embed(table_LE: Tensor, rows_T: Tensor) -> Tensor:
    return embedding(rows_T, table_LE)


def peer(function: Callable[..., Tensor], look_up: Callable[..., Tensor], case: Case, x: Inputs) -> Tensor:
    return function(look_up, case.combine, x.x_TE, x.coords_T2, x.row_table_LE, x.column_table_LE, x.weight_E)


def contenders(device: str) -> dict[str, Run]:
    compiled = plain if device == "cpu" else torch.compile(plain, dynamic=False)
    return {
        OURS: ours,
        "torch_index": functools.partial(peer, plain, index),
        "torch_embedding_compiled": functools.partial(peer, compiled, embed),
    }


# Correctness and time


def outcome(run: Run, case: Case, x: Inputs) -> list[Tensor]:
    y_TE = run(case, x)
    return [y_TE.detach(), *torch.autograd.grad(y_TE, x.leaves, x.dy_TE.to(y_TE.dtype))]


def checks(case: Case, device: str) -> dict[str, Callable[[], None]]:
    x = case.inputs(SMOKE_TOKENS if device == "cpu" else GATE_TOKENS, device)
    reference = functools.partial(ours, backend="reference")
    return outcome_checks(contenders(device), OURS, reference, outcome, case, x)


def main() -> None:
    options = parse_options(parser(__doc__.splitlines()[0]))
    tokens = SMOKE_TOKENS if options.smoke else TOKENS
    rows: list[Row] = []
    for case in CASES:
        torch._dynamo.reset()  # past a few recompilations of one function, torch.compile runs it eagerly
        gate(checks(case, options.device))
        elements = tokens * case.width
        floors = {
            "fwd": ceilings().floor_us(4 * elements + 8 * tokens),
            "bwd": ceilings().floor_us((6 if case.norm else 2) * elements),
        }
        sets = [case.inputs(tokens, options.device, seed) for seed in range(sets_beyond_cache(2 * elements))]
        about = {"case": case.name, "tokens": tokens, "width": case.width, "combine": case.combine,
                 "coords": case.coords, "norm": case.norm, "dtype": "bf16"}  # fmt: skip
        for name, run in contenders(options.device).items():
            timer = "graph" if name == OURS else "kernels"  # an indexing backward may wait for the GPU
            forwards = [functools.partial(without_gradients, run, case, x) for x in sets]
            backwards = [
                functools.partial(torch.autograd.grad, run(case, x), x.leaves, x.dy_TE, retain_graph=True) for x in sets
            ]
            for direction, runs in (("fwd", forwards), ("bwd", backwards)):
                us = measure(runs, timer, options.milliseconds).us
                row = {"direction": direction, "contender": name, "us": us, "floor_us": floors[direction]}
                rows.append({**about, **row, "timer": timer})
    print_table(rows)
    write_results("positions", rows, options)


if __name__ == "__main__":
    main()
