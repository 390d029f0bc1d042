"""The norm pass in front of flash-attn: q and k in one launch, forward and backward.

Per head and row x, of q or k, with x̂ = r·C x (C the centring of layer_norm, identity otherwise; r as in steps.py):

    y = γ ⊙ x̂ + β          dγ = Σ dy ⊙ x̂    dβ = Σ dy    dx̂ = γ ⊙ dy    dx = r·(C dx̂ − x̂·mean(dx̂ ⊙ x̂))

βk is left out: it shifts all scores of a query alike, which softmax does not see. The sums over rows are taken by
program into `partials` (N, H, 2, D), then over the programs in a fixed order. A program owns ROWS tokens of one head;
the first programs have q's tokens, the others k's. A side without a norm (NONE) has no programs. Strides are constants
as in kernel.py.

LayerNorm: Ba, Kiros, Hinton 2016, arXiv 1607.06450; QK norm as in ViT-22B (Dehghani et al. 2023, arXiv 2302.05442).
T tokens, H heads, D head width, N programs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import split_head_dim
from .steps import (
    NONE,
    add_columns,
    cast,
    column_dot,
    column_sum,
    load_rows,
    load_vector,
    row_statistics,
    scale_columns,
    store_rows,
    store_vector,
    unit_rows,
    unit_rows_backward,
)

ELEMENTS = 4096  # of a program's tile, rounded down to whole rows of D1 + D2
FORWARD_WARPS, BACKWARD_WARPS = 4, 8  # at most 64 and 96 registers at D = 64 on sm_90; untimed


@triton.jit
def normalize_rows(
    x_ptr, y_ptr, weight_ptr, bias_ptr, h, row, tokens, x_stride_t, x_stride_h, weight_stride, bias_stride, eps,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, ROWS)
    mask = row + offs < tokens
    x = load_rows(x_ptr + h.to(tl.int64) * x_stride_h, row, offs, x_stride_t, mask, D, D1, D2)
    weight = load_vector(weight_ptr + h * weight_stride, WEIGHT, 1.0, D, D1, D2)
    bias = load_vector(bias_ptr + h * bias_stride, BIAS, 0.0, D, D1, D2)

    mean, r = row_statistics(x, eps, NORM, D, D1, D2)
    y = unit_rows(x, mean, r, NORM, D, D1, D2)
    if WEIGHT:
        y = scale_columns(y, weight)
    if BIAS:
        y = add_columns(y, bias)

    store_rows(y_ptr + h * D, row, offs, H * D, mask, y, D, D1, D2)


@triton.jit(do_not_specialize=["q_tokens", "k_tokens"])
def forward_norms(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, q_tokens, k_tokens, q_eps, k_eps,
    q_stride_t: tl.constexpr, q_stride_h: tl.constexpr, k_stride_t: tl.constexpr, k_stride_h: tl.constexpr,
    q_weight_stride: tl.constexpr, q_bias_stride: tl.constexpr, k_weight_stride: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_WEIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % H
    row = tl.program_id(0) // H * ROWS
    k_row = row
    if Q_NORM != NONE:
        k_row -= tl.cdiv(q_tokens, ROWS) * ROWS
        if row < q_tokens:
            normalize_rows(
                q_ptr, q_out_ptr, q_weight_ptr, q_bias_ptr, h, row, q_tokens, q_stride_t, q_stride_h,
                q_weight_stride, q_bias_stride, q_eps, H, D, D1, D2, Q_NORM, Q_WEIGHT, Q_BIAS, ROWS,
            )  # fmt: skip
    if K_NORM != NONE and k_row >= 0:
        normalize_rows(
            k_ptr, k_out_ptr, k_weight_ptr, k_weight_ptr, h, k_row, k_tokens, k_stride_t, k_stride_h,
            k_weight_stride, k_weight_stride, k_eps, H, D, D1, D2, K_NORM, K_WEIGHT, False, ROWS,
        )  # fmt: skip


@triton.jit
def normalize_rows_backward(
    x_ptr, dy_ptr, dx_ptr, partials_ptr, weight_ptr, h, row, tokens, x_stride_t, x_stride_h, weight_stride, eps,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, ROWS)
    mask = row + offs < tokens
    x = load_rows(x_ptr + h.to(tl.int64) * x_stride_h, row, offs, x_stride_t, mask, D, D1, D2)
    dy = load_rows(dy_ptr + h * D, row, offs, H * D, mask, D, D1, D2)
    weight = load_vector(weight_ptr + h * weight_stride, WEIGHT, 1.0, D, D1, D2)

    mean, r = row_statistics(x, eps, NORM, D, D1, D2)
    r = tl.where(mask, r, 0.0)  # with eps = 0 the r of a row of zeros is infinite
    x_hat = unit_rows(x, mean, r, NORM, D, D1, D2)
    grad = cast(dy, tl.float32)
    if SUMS:
        base = partials_ptr + (row // ROWS * H + h).to(tl.int64) * (2 * D)
        store_vector(base, column_dot(grad, x_hat), D, D1, D2)
        store_vector(base + D, column_sum(grad), D, D1, D2)
    if WEIGHT:
        grad = scale_columns(grad, weight)
    dx = unit_rows_backward(grad, x_hat, r, eps, NORM, D, D1, D2)

    store_rows(dx_ptr + h * D, row, offs, H * D, mask, dx, D, D1, D2)


@triton.jit(do_not_specialize=["q_tokens", "k_tokens"])
def backward_norms(
    q_ptr, k_ptr, q_dout_ptr, k_dout_ptr, dq_ptr, dk_ptr, q_partials_ptr, k_partials_ptr, q_weight_ptr, k_weight_ptr,
    q_tokens, k_tokens, q_eps, k_eps, q_stride_t: tl.constexpr, q_stride_h: tl.constexpr, k_stride_t: tl.constexpr,
    k_stride_h: tl.constexpr, q_weight_stride: tl.constexpr, k_weight_stride: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, Q_SUMS: tl.constexpr, K_SUMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % H
    row = tl.program_id(0) // H * ROWS
    k_row = row
    if Q_NORM != NONE:
        k_row -= tl.cdiv(q_tokens, ROWS) * ROWS
        if row < q_tokens:
            normalize_rows_backward(
                q_ptr, q_dout_ptr, dq_ptr, q_partials_ptr, q_weight_ptr, h, row, q_tokens, q_stride_t, q_stride_h,
                q_weight_stride, q_eps, H, D, D1, D2, Q_NORM, Q_WEIGHT, Q_SUMS, ROWS,
            )  # fmt: skip
    if K_NORM != NONE and k_row >= 0:
        normalize_rows_backward(
            k_ptr, k_dout_ptr, dk_ptr, k_partials_ptr, k_weight_ptr, h, k_row, k_tokens, k_stride_t, k_stride_h,
            k_weight_stride, k_eps, H, D, D1, D2, K_NORM, K_WEIGHT, K_SUMS, ROWS,
        )  # fmt: skip


@dataclass(frozen=True)
class Side:
    """q or k with its norm: kind is one of NORM_CODES, weight and bias (D,), (H, D) or None."""

    x: Tensor
    kind: int
    weight: Tensor | None
    bias: Tensor | None  # of k: always None
    eps: float

    def arguments(self, name: str, *parts: str) -> dict:
        """What the kernels take for a side called `name`, with those of its vectors that they read."""
        args: dict = {
            f"{name}_ptr": self.x, f"{name}_tokens": self.x.shape[0], f"{name}_stride_t": self.x.stride(0),
            f"{name}_stride_h": self.x.stride(1), f"{name}_eps": self.eps, f"{name.upper()}_NORM": self.kind,
        }  # fmt: skip
        for part in parts:
            vector = getattr(self, part)
            args[f"{name}_{part}_ptr"] = self.x if vector is None else vector.contiguous()
            args[f"{name}_{part}_stride"] = 0 if vector is None or vector.dim() == 1 else vector.shape[1]
            args[f"{name}_{part}".upper()] = vector is not None
        return args


def _shape(x: Tensor) -> dict:
    heads, width = x.shape[1:]
    first, second = split_head_dim(width)
    return dict(H=heads, D=width, D1=first, D2=second, ROWS=ELEMENTS // triton.next_power_of_2(width))


def _programs(side: Side, shape: dict) -> int:
    """Programs of a head."""
    return triton.cdiv(side.x.shape[0], shape["ROWS"]) if side.kind else 0


def forward(q: Side, k: Side) -> tuple[Tensor, Tensor]:
    """Normalized q and k, contiguous and in their dtype; empty where a side has no norm."""
    shape = _shape(q.x)
    outputs = [x.x.new_empty(x.x.shape if x.kind else (0,)) for x in (q, k)]
    if programs := _programs(q, shape) + _programs(k, shape):
        forward_norms[(programs * shape["H"],)](
            **shape, **q.arguments("q", "weight", "bias"), **k.arguments("k", "weight"),
            q_out_ptr=outputs[0], k_out_ptr=outputs[1], num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return outputs[0], outputs[1]


def backward(
    q: Side, k: Side, q_dout: Tensor, k_dout: Tensor, q_sums: bool, k_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, and of q and of k the gradients of γ and β, float32 (H, 2, D)); empty where there is none.

    q_dout, k_dout: of the normalized q and k; not read where a side has no norm.
    """
    shape = _shape(q.x)
    sides, sums = (q, k), (q_sums, k_sums)
    dx = [x.x.new_empty(x.x.shape if x.kind else (0,)) for x in sides]
    partials = [
        x.x.new_empty((_programs(x, shape), shape["H"], 2, shape["D"]) if wanted else (0,), dtype=torch.float32)
        for x, wanted in zip(sides, sums, strict=True)
    ]
    if programs := _programs(q, shape) + _programs(k, shape):
        backward_norms[(programs * shape["H"],)](
            **shape, **q.arguments("q", "weight"), **k.arguments("k", "weight"),
            q_dout_ptr=q_dout.contiguous(), k_dout_ptr=k_dout.contiguous(), dq_ptr=dx[0], dk_ptr=dx[1],
            q_partials_ptr=partials[0], k_partials_ptr=partials[1],
            Q_SUMS=q_sums, K_SUMS=k_sums, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    return dx[0], dx[1], *(p.sum(0) if wanted else p for p, wanted in zip(partials, sums, strict=True))
