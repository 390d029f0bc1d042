"""An MLP whose activation costs no pass of its own, forward and backward.

    hidden = x @ upᵀ + up_bias         rounded to x's dtype; for "swiglu" (T, 2M): gates, then values
    act    = f(hidden)                 rounded
    out    = act @ downᵀ + down_bias

    f(h) = h · Φ(h)                                          "gelu", Φ(h) = (1 + erf(h / √2)) / 2
    f(h) = h · σ, σ = sigmoid(2 √(2/π) (h + 0.044715 h³))    "gelu_tanh", in which (1 + tanh y) / 2 = sigmoid(2y)
    f(gate, value) = gate · sigmoid(gate) · value            "swiglu"

Backward, with dact = dout @ down, rounded:

    dhidden = f'(hidden) · dact        f'(h) = σ + h σ (1 − σ) · 2 √(2/π) (1 + 0.134145 h²)    "gelu_tanh"
    dx = dhidden @ up        dup = dhiddenᵀ @ x        ddown = doutᵀ @ act
    dup_bias = Σ_tokens dhidden        ddown_bias = Σ_tokens dout

On Hopper, where the table says so, `up_kernel` writes hidden and act behind its product, and `down_backward_kernel`
writes act (again: it was not kept) and dhidden behind its own (hopper_kernel.py), so that hidden moves once in the
forward and dact never. All other products are torch's, and elsewhere the activations, too. dup_bias sums over each row
of tiles, then over the rows: no atomics, the same bits every time.

Hendrycks, Gimpel: Gaussian Error Linear Units (2016), arXiv 1606.08415; Shazeer: GLU Variants (2020), arXiv 2002.05202.
T tokens, E model width, M MLP width, U hidden width: M, or 2M for "swiglu".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._jit import architecture, gluon_is_supported


@functools.cache
def _hopper() -> Any:
    """hopper_kernel.py, and with it Gluon, once it is needed."""
    from . import hopper_kernel

    return hopper_kernel


def choose_config(arch: int, activation: str, width: int, bias: bool) -> dict[str, int] | None:
    """Launch choice of both kernels; None where torch's products and passes for the activation are taken.

    up_chunk, down_chunk: rows that the activation's warpgroup takes at a time. down_ahead: so many chunks of hidden are
    under way to it: the fewer steps a product has, the more it needs; the sums for a bias leave registers for one.

    H100, bfloat16, no biases, µs at 65,536 × 768 × 3072 (2048 for "swiglu"), 32,768 × 1024 × 4096 and 33,024 × 1152 ×
    4304, of two runs the better; torch's product alone; it and its passes (benchmarks/search_mlp.py):

        "gelu_tanh"    hidden and act                     559, 474, 563    479, 439, 512      725, 577, 668
                       act and dhidden, 16 rows, 1 ahead  730, 531, 605    471, 398, 506     1113, 844, 936
                                                 2 ahead  687, 533, 648
                       8 rows, 2 to 6 ahead               675, 530, 648
        "gelu"         hidden and act                     572              496                761
                       act and dhidden, 1, 2 ahead        784, 735         498               1159
        "swiglu"       hidden and act                     656              620               1340
                       act and dhidden, 16 rows, 1 ahead  681              330               2957
                       8 rows, 2, 3, 4 ahead              669, 635, 646

    float16 takes as long as bfloat16: 559 and 652 for 722 and 1108. Rows of 32 in the first kernel are within 2%, or
    fall 15% behind in one run of two; more chunks ahead than these spill (982 for two of 16 rows of "swiglu").
    Without activation and stores both take 388 and 379 for B/16, 800 TFLOP/s; what is moved between the L2 cache and
    the multiprocessors, 3.6 GB of blocks and 0.8 to 1.2 of the rest, sets their pace. Slower for B/16, too: blocks of
    32 instead of 64 in six stages; the product of a step still under way in the next; hidden brought into the L2 cache
    a tile ahead. Elsewhere not measured.
    """
    if arch != 90:
        return None
    if activation == "swiglu":
        return {"up_chunk": 16, "down_chunk": 8, "down_ahead": 3}
    return {"up_chunk": 16, "down_chunk": 16, "down_ahead": 1 if bias or width > 1024 else 2}


def fused_config(x_TE: Tensor, mlp_width: int, activation: str, bias: bool) -> dict[str, int] | None:
    """The launch choice, or None where torch does it: on CPU, in float32, where rows are not 16-byte aligned."""
    fits = x_TE.itemsize == 2 and x_TE.shape[1] % 8 == 0 and mlp_width % 8 == 0 and x_TE.numel() > 0
    if not fits or not gluon_is_supported():
        return None
    return choose_config(architecture(x_TE.device), activation, x_TE.shape[1], bias)


def _activate_torch(hidden_TU: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate_TM, value_TM = hidden_TU.chunk(2, 1)
        return torch.nn.functional.silu(gate_TM) * value_TM
    return torch.nn.functional.gelu(hidden_TU, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward_torch(dact_TM: Tensor, hidden_TU: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate_TM, value_TM = hidden_TU.chunk(2, 1)
        dhidden_TU = hidden_TU.new_empty(hidden_TU.shape)
        dgate_TM, dvalue_TM = dhidden_TU.chunk(2, 1)
        torch.ops.aten.silu_backward.grad_input(dact_TM * value_TM, gate_TM, grad_input=dgate_TM)
        torch.mul(dact_TM, torch.nn.functional.silu(gate_TM), out=dvalue_TM)
        return dhidden_TU
    return torch.ops.aten.gelu_backward(dact_TM, hidden_TU, approximate="tanh" if activation == "gelu_tanh" else "none")


def weight_gradient(dout_TN: Tensor, x_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """doutᵀ @ x; in float32 as the product has it, not rounded to 16 bits between."""
    if x_TK.dtype == dtype or x_TK.device.type != "cuda":
        return (dout_TN.T @ x_TK).to(dtype)
    return torch.mm(dout_TN.T, x_TK, out_dtype=dtype)


def feed_forward(
    x_TE: Tensor,
    up_UE: Tensor,
    down_EM: Tensor,
    up_bias_U: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return out and, if it is to be kept, hidden."""
    tokens, mlp_width = x_TE.shape[0], down_EM.shape[1]
    config = fused_config(x_TE, mlp_width, activation, up_bias_U is not None)
    if config is None:
        hidden_TU = linear(x_TE, up_UE, up_bias_U)
        act_TM = _activate_torch(hidden_TU, activation)
    else:
        hidden_TU = x_TE.new_empty(tokens, up_UE.shape[0]) if keep_hidden else None
        act_TM = x_TE.new_empty(tokens, mlp_width)
        _hopper().up(x_TE, up_UE, up_bias_U, hidden_TU, act_TM, activation, config["up_chunk"])
    return linear(act_TM, down_EM, down_bias_E), hidden_TU if keep_hidden else None


def feed_forward_backward(
    dout_TE: Tensor,
    x_TE: Tensor,
    hidden_TU: Tensor | None,
    up_UE: Tensor,
    down_EM: Tensor,
    up_bias_U: Tensor | None,
    activation: str,
    weight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dup and ddown in weight_dtype, and in float32 rows (G, U) whose sum is dup_bias; all but dx are None
    for no weight_dtype, and the last where there is no bias. A hidden that was not kept is computed again."""
    tokens, mlp_width = x_TE.shape[0], down_EM.shape[1]
    if hidden_TU is None:
        hidden_TU = linear(x_TE, up_UE, up_bias_U)
    bias_grad = weight_dtype is not None and up_bias_U is not None
    config = fused_config(x_TE, mlp_width, activation, up_bias_U is not None)
    if config is None:
        act_TM = _activate_torch(hidden_TU, activation)
        dhidden_TU = _activate_backward_torch(dout_TE @ down_EM, hidden_TU, activation)
        partial_GU = dhidden_TU.sum(0, keepdim=True, dtype=torch.float32) if bias_grad else None
    else:
        act_TM, dhidden_TU = x_TE.new_empty(tokens, mlp_width), x_TE.new_empty(tokens, up_UE.shape[0])
        rows = _hopper().tile_rows(tokens)
        partial_GU = x_TE.new_empty(rows, up_UE.shape[0], dtype=torch.float32) if bias_grad else None
        _hopper().down_backward(
            dout_TE, down_EM, hidden_TU.contiguous(), act_TM, dhidden_TU, partial_GU, activation, config["down_chunk"],
            config["down_ahead"],
        )  # fmt: skip
    ddown_EM = None if weight_dtype is None else weight_gradient(dout_TE, act_TM, weight_dtype)
    del act_TM  # frees what the next products write
    dup_UE = None if weight_dtype is None else weight_gradient(dhidden_TU, x_TE, weight_dtype)
    return dhidden_TU @ up_UE, dup_UE, ddown_EM, partial_GU
