"""Tokens to one vector per image: attention pooling with QK LayerNorm, mean and maximum, forward and backward.

bfloat16 tokens, float32 parameters. Floors, for T tokens of E = H·D channels; queries, statistics, results are small:
    attention  forward: read k and v, 4·T·E bytes; backward: read k and v, write dk and dv, 8·T·E
    mean, max  forward: read x, 2·T·E; backward: write dx, 2·T·E

torch_segments adds up by image with index_add and scatter_reduce; torch_padded pads to the longest image and masks
(scaled_dot_product_attention; for mean and max, sum and amax). Both are compiled, which is faster throughout. Whether
the backward is bitwise repeatable is not asked of them.
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
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from navit_kernels import HeadNorm
from navit_kernels.testing import cu_seqlens_of, image_lengths
from navit_kernels.token_pooling import attention_pool, pool_tokens

OURS = "navit_kernels"
TOKENS, GATE_TOKENS, SMOKE_TOKENS = 65536, 4096, 300
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """name: a mix of image sizes. pooling: "attention", "mean" or "max"."""

    name: str
    pooling: str = "attention"
    heads: int = 12
    head_dim: int = 64
    queries: int = 1

    def inputs(self, tokens: int, device: str, seed: int = 0) -> "Inputs":
        randn = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(seed))
        lengths = image_lengths(self.name, tokens)
        lengths_S = torch.tensor(lengths)
        starts_T = (lengths_S.cumsum(0) - lengths_S).repeat_interleave(lengths_S)
        shape = (self.queries, self.heads, self.head_dim)
        return Inputs(
            randn(sum(lengths), *shape[1:]).bfloat16().requires_grad_(),
            randn(sum(lengths), *shape[1:]).bfloat16().requires_grad_(),
            randn(shape).requires_grad_(),
            randn(self.head_dim).requires_grad_(),
            randn(self.head_dim).requires_grad_(),
            cu_seqlens_of(lengths, device),
            torch.arange(len(lengths)).repeat_interleave(lengths_S).to(device),
            (torch.arange(sum(lengths)) - starts_T).to(device),
            max(lengths),
            randn(len(lengths), *shape).bfloat16(),
        )


@dataclass(frozen=True)
class Inputs:
    """images_T, places_T and longest are what the peers need to know; they are not timed."""

    k_THD: Tensor
    v_THD: Tensor
    query_QHD: Tensor
    q_weight_D: Tensor
    k_weight_D: Tensor
    cu_seqlens: Tensor
    images_T: Tensor
    places_T: Tensor
    longest: int
    dout_SQHD: Tensor

    @property
    def segments(self) -> int:
        return len(self.cu_seqlens) - 1

    def leaves(self, pooling: str) -> list[Tensor]:
        leaves = [self.k_THD, self.v_THD, self.query_QHD, self.q_weight_D, self.k_weight_D]
        return leaves if pooling == "attention" else leaves[:1]

    def double(self) -> "Inputs":
        leaves = (leaf.detach().double().requires_grad_() for leaf in self.leaves("attention"))
        rest = self.cu_seqlens, self.images_T, self.places_T, self.longest
        return Inputs(*leaves, *rest, self.dout_SQHD.double())


CASES = (
    Case("pt"),
    Case("ft"),
    Case("hr"),
    Case("U256"),
    Case("ft", heads=16, head_dim=72),
    Case("ft", queries=4),
    Case("pt", "mean"),
    Case("hr", "mean"),
    Case("pt", "max"),
    Case("hr", "max"),
)
Run = Callable[[Case, Inputs], Tensor]


# Contenders: each returns (S, Q, H, D) for attention and (S, H·D), pooled from k, for mean and max


def ours(case: Case, x: Inputs, backend: str = "auto") -> Tensor:
    if case.pooling != "attention":
        return pool_tokens(x.k_THD.flatten(1), x.cu_seqlens, case.pooling, backend=backend)
    norms = {"q_norm": HeadNorm(weight=x.q_weight_D, eps=EPS), "k_norm": HeadNorm(weight=x.k_weight_D, eps=EPS)}
    return attention_pool(x.query_QHD, x.k_THD, x.v_THD, x.cu_seqlens, **norms, backend=backend)


def normed(x: Tensor, weight_D: Tensor) -> Tensor:
    return layer_norm(x, weight_D.shape, weight_D.to(x.dtype), None, EPS)


def torch_segments(
    pooling: str, k_THD: Tensor, v_THD: Tensor, query_QHD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor,
    images_T: Tensor, places_T: Tensor, segments: int, longest: int,
) -> Tensor:  # fmt: skip
    if pooling != "attention":
        x_TE = k_THD.flatten(1)
        out_SE = x_TE.new_zeros(segments, x_TE.shape[1], dtype=torch.float32)
        if pooling == "max":
            index_TE = images_T[:, None].expand_as(x_TE)
            return out_SE.scatter_reduce(0, index_TE, x_TE.float(), "amax", include_self=False).to(x_TE.dtype)
        counts_S1 = out_SE.new_zeros(segments, 1).index_add(0, images_T, out_SE.new_ones(len(x_TE), 1))
        return (out_SE.index_add(0, images_T, x_TE.float()) / counts_S1).to(x_TE.dtype)
    q_QHD, k_THD = normed(query_QHD.to(k_THD.dtype), q_weight_D), normed(k_THD, k_weight_D)
    score_TQH = torch.einsum("qhd,thd->tqh", q_QHD, k_THD).float() * q_QHD.shape[-1] ** -0.5
    index_TQH = images_T[:, None, None].expand_as(score_TQH)
    shape = (segments, *score_TQH.shape[1:])
    top_SQH = score_TQH.new_zeros(shape).scatter_reduce(0, index_TQH, score_TQH.detach(), "amax", include_self=False)
    p_TQH = (score_TQH - top_SQH[images_T]).exp()
    total_SQH = p_TQH.new_zeros(shape).index_add(0, images_T, p_TQH)
    weighted_TQHD = p_TQH[..., None] * v_THD[:, None]
    out_SQHD = weighted_TQHD.new_zeros(*shape, v_THD.shape[-1]).index_add(0, images_T, weighted_TQHD)
    return (out_SQHD / total_SQH[..., None]).to(v_THD.dtype)


def torch_padded(
    pooling: str, k_THD: Tensor, v_THD: Tensor, query_QHD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor,
    images_T: Tensor, places_T: Tensor, segments: int, longest: int,
) -> Tensor:  # fmt: skip
    valid_SL = torch.zeros(segments, longest, dtype=torch.bool, device=k_THD.device)
    valid_SL = valid_SL.index_put((images_T, places_T), torch.ones_like(images_T, dtype=torch.bool))

    def padded(x_THD: Tensor) -> Tensor:
        return x_THD.new_zeros(segments, longest, *x_THD.shape[1:]).index_put((images_T, places_T), x_THD)

    if pooling == "max":
        return padded(k_THD).masked_fill(~valid_SL[..., None, None], float("-inf")).amax(1).flatten(1)
    if pooling == "mean":
        return (padded(k_THD).float().sum(1).flatten(1) / valid_SL.sum(1, keepdim=True)).to(k_THD.dtype)
    q_QHD = normed(query_QHD.to(k_THD.dtype), q_weight_D)
    q_SHQD = q_QHD.transpose(0, 1).expand(segments, -1, -1, -1)
    k_SHLD, v_SHLD = padded(normed(k_THD, k_weight_D)).transpose(1, 2), padded(v_THD).transpose(1, 2)
    return scaled_dot_product_attention(q_SHQD, k_SHLD, v_SHLD, valid_SL[:, None, None]).transpose(1, 2)


def peer(function: Callable[..., Tensor], case: Case, x: Inputs) -> Tensor:
    return function(case.pooling, *x.leaves("attention"), x.images_T, x.places_T, x.segments, x.longest)


def contenders(device: str) -> dict[str, Run]:
    runs: dict[str, Run] = {OURS: ours}
    for name, function in (("torch_segments", torch_segments), ("torch_padded", torch_padded)):
        if device == "cpu":
            runs[name] = functools.partial(peer, function)
        else:
            runs[f"{name}_compiled"] = functools.partial(peer, torch.compile(function, dynamic=False))
    return runs


# Correctness and time


def cotangent(case: Case, x: Inputs, out: Tensor) -> Tensor:
    return x.dout_SQHD.to(out.dtype) if case.pooling == "attention" else torch.ones_like(out)


def outcome(run: Run, case: Case, x: Inputs) -> list[Tensor]:
    out = run(case, x)
    return [out.detach(), *torch.autograd.grad(out, x.leaves(case.pooling), cotangent(case, x, out))]


def checks(case: Case, device: str) -> dict[str, Callable[[], None]]:
    x = case.inputs(SMOKE_TOKENS if device == "cpu" else GATE_TOKENS, device)
    reference = functools.partial(ours, backend="reference")
    # they round normed keys and scores to bfloat16; amax shares the gradient of equal values
    compared = 1 if case.pooling == "max" else None
    return outcome_checks(contenders(device), OURS, reference, outcome, case, x, 0.15, compared)


def main() -> None:
    options = parse_options(parser(__doc__.splitlines()[0]))
    wanted = SMOKE_TOKENS if options.smoke else TOKENS
    rows: list[Row] = []
    for case in CASES:
        torch._dynamo.reset()  # past a few recompilations of one function, torch.compile runs it eagerly
        gate(checks(case, options.device))
        bytes_per_set = 2 * wanted * case.heads * case.head_dim
        sets = [case.inputs(wanted, options.device, seed) for seed in range(sets_beyond_cache(bytes_per_set))]
        tokens = sum(len(x.k_THD) for x in sets) / len(sets)
        one = 2 * tokens * case.heads * case.head_dim
        bytes_moved = {"fwd": 2 * one, "bwd": 4 * one} if case.pooling == "attention" else {"fwd": one, "bwd": one}
        about = {"case": case.name, "pooling": case.pooling, "heads": case.heads, "head_dim": case.head_dim,
                 "queries": case.queries, "dtype": "bf16"}  # fmt: skip
        for name, run in contenders(options.device).items():
            timer = "graph" if name == OURS else "kernels"  # peers may wait for the GPU
            backwards = []
            for x in sets:
                out = run(case, x)
                arguments = out, x.leaves(case.pooling), cotangent(case, x, out)
                backwards.append(functools.partial(torch.autograd.grad, *arguments, retain_graph=True))
            for direction, runs in (
                ("fwd", [functools.partial(without_gradients, run, case, x) for x in sets]),
                ("bwd", backwards),
            ):
                us = measure(runs, timer, options.milliseconds).us
                row = {"direction": direction, "contender": name, "us": us}
                rows.append({**about, **row, "floor_us": ceilings().floor_us(bytes_moved[direction]), "timer": timer})
    print_table(rows)
    write_results("token_pooling", rows, options)


if __name__ == "__main__":
    main()
