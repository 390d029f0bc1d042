"""Varlen attention, backward of long segments on Hopper, in Gluon. The maths stands in kernel.py.

Two kernels after backward_prepare, as in kernel_backward.py: hopper_keys owns keys (dk, dv), hopper_queries owns
queries (dq over u): seven products, no sum between programs. A program stays on its multiprocessor and takes one item
of TILE rows and one head after another. One warp loads (TMA); two warpgroups own BLOCK rows each, exchange nothing:

    hopper_keys     own k, v; u, dO, lse, Δ pass      Sᵀ = K·uᵀ   dPᵀ = V·dOᵀ   dV += Pᵀ·dO   a += Gᵀ·u
    hopper_queries  own u, dO; k, v, r pass           S = u·Kᵀ    dP = dO·Vᵀ    du += G·K

P and G, left operands, stay in registers: in the loop nothing is written to shared memory. So do, where a head is
narrow enough (HOLD), the rows a warpgroup owns, left operands of the first two products. Beside the other warpgroup's
products, what runs under the softmax of a block is what takes the last one's P and G (in hopper_keys with OVERLAP
alone) and, in hopper_queries, the next one's scores:

    matrix unit   S₀ dP₀        │ S₁ dP₁ dV₀ a₀       │ S₂ dP₂ dV₁ a₁       │ dV₂ a₂          hopper_keys
    registers            P₀ G₀  │          P₁  G₁     │          P₂  G₂     │
    matrix unit   S₀ dP₀ S₁     │ dP₁ S₂ du₀          │ dP₂ du₁             │ du₂             hopper_queries
    registers         P₀    G₀  │ P₁     G₁           │ P₂      G₂          │

Barriers, of which the warpgroups wait for the full ones and the loader for the empty ones:

    own_full  ⇄ own_empty    a warpgroup's rows: loaded; read for the last time
    full      ⇄ empty        a stage of what passes: loaded; read by both warpgroups
    q_full    ⇄ q_empty      raw q for hopper_queries' epilogue: loaded; dq, which leaves by the same tile, has left

One writer an address and no atomics: bits repeat. That costs the two products that both kernels compute. Five, at the
rate of hopper_keys, would take 3990 µs of the 6080 at 4096 tokens each (16 heads of 64, 65,536 tokens), and 810 of the
1295 at ft; less the atomics and the float32 dq, which it takes 270 µs to clear and convert. That is the most that
determinism can cost here; the other way was not built.

Per-row numbers pass by TMA, too, whose starts are multiples of 16 bytes: backward_prepare writes them item by item,
padded to TILE: rows (items, H, TILE / BLOCK, 2, BLOCK) of (lse, Δ), lse = +inf past the end, and sizes (items, H, TILE)
of r_k, 1 past the end. Rows past a segment's end are loaded as zeros and never stored (see hopper_steps.py). Only the
last block of keys of hopper_queries needs a mask, and it is the first to pass.

T tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._jit import launch_kernel, multiprocessors, triton_version
from .hopper_backward_keys import hopper_keys
from .hopper_backward_queries import hopper_queries
from .hopper_steps import numbers, parts, ragged_parts
from .hopper_stream_steps import BLOCK


def schedule_of(width: int) -> tuple[tuple[bool, bool], bool, int]:
    """What fits registers: HOLD of hopper_keys and of hopper_queries, hopper_keys' OVERLAP, hopper_queries' UNROLL,
    blocks of a turn of its loop.

    Since Triton 3.9 less fits at 72: ft takes 1256 + 1826 µs there by the older schedule, 1165 + 963 by the widest's.
    At 64 UNROLL of 1 was better for ft, 1681 for 1787, and worse at 4096, 6936 for 6735.
    """
    if width <= 64:
        return (True, True), True, 2
    if width <= 80 and triton_version() < (3, 9):
        return (False, True), True, 1
    return (False, False), False, 1


def backward_stream(
    call: Any, index: int, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, rows: Tensor, sizes: Tensor,
    partials: Tensor, splits: int, weight_grads: bool, *, stages: tuple[int, int], registers: int = 240,
) -> None:  # fmt: skip
    """dk and dv, then dq over u. rows and sizes are backward_prepare's; stages those of hopper_keys and of
    hopper_queries."""
    norms = call.norms
    hold, overlap, unroll = schedule_of(call.width)
    _, second = parts(call.width)
    tensors = dict(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq, dk=dk, dv=dv)
    halves = ragged_parts(call.width, BLOCK.value, **tensors)

    def descriptors(*names: str) -> dict:
        return {f"{name}_{c}": halves[f"{name}_{c}"] for c in (1, 2) for name in names}

    rows_in, sizes_in = numbers(rows, BLOCK.value), numbers(sizes, BLOCK.value)
    grid = (min(*call.grid(index), multiprocessors(call.q.device)),)
    common = dict(
        **call.work(index), CLASS=index, score_scale=call.score_scale, H=call.heads, D=call.width, D2=second,
        rows_in=rows_in, sizes_in=sizes_in, K_NORM=norms.k_kind, FOLD=call.fold, REGISTERS=registers, num_warps=4,
    )  # fmt: skip
    launch_kernel(
        hopper_keys, grid,
        **descriptors("k", "v", "dout", "dk", "dv"), u_1=halves["dq_1"], u_2=halves["dq_2"],
        key_factor=call.key_factor, k_eps=norms.k_eps, STAGES=stages[0], HOLD=hold[0],
        OVERLAP=overlap, **common,
    )  # fmt: skip
    launch_kernel(
        hopper_queries, grid,
        **descriptors("k", "v", "q", "dout", "dq"),
        partials_ptr=partials, softmax_scale=call.softmax_scale, q_eps=norms.q_eps, **call.weights(),
        Q_NORM=norms.q_kind, WEIGHT_GRADS=weight_grads, splits=splits, STAGES=stages[1], HOLD=hold[1], UNROLL=unroll,
        **common,
    )  # fmt: skip
