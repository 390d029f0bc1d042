"""An MLP whose activation costs no pass of its own, forward and backward.

    hidden = x @ upᵀ + up_bias         rounded to x's dtype; for "swiglu" (T, 2M): gates, then values
    act    = f(hidden)                 rounded
    out    = act @ downᵀ + down_bias

    f(h) = h · Φ(h)                                          "gelu", Φ(h) = (1 + erf(h / √2)) / 2
    f(h) = h · σ, σ = sigmoid(2 √(2/π) (h + 0.044715 h³))    "gelu_tanh", in which (1 + tanh y) / 2 = sigmoid(2y)
    f(gate, value) = gate · sigmoid(gate) · value            "swiglu"

Backward, with dact = dout @ down:

    dhidden = f'(hidden) · dact        f'(h) = σ + h σ (1 − σ) · 2 √(2/π) (1 + 0.134145 h²)    "gelu_tanh"
    dx = dhidden @ up        dup = dhiddenᵀ @ x        ddown = doutᵀ @ act
    dup_bias = Σ_tokens dhidden        ddown_bias = Σ_tokens dout

For "gelu_tanh", `up_kernel` writes hidden and act behind its product, and `down_backward_kernel` writes act (again: it
was not kept) and dhidden behind its own, so that hidden moves once in the forward and dact never. All other products,
and the other activations, are torch's. dup_bias sums over each row of tiles, then over the rows: no atomics, the same
bits every time.

Hendrycks, Gimpel: Gaussian Error Linear Units (2016), arXiv 1606.08415; Shazeer: GLU Variants (2020), arXiv 2002.05202.
T tokens, E model width, M MLP width, U hidden width: M, or 2M for "swiglu".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.tools.tensor_descriptor import TensorDescriptor

from .._jit import architecture

PARTS = tl.constexpr(4)  # of a tile's columns: an epilogue holds one of them in registers at a time


@triton.jit
def _gelu(h):
    """(share, slope): f(h) = h · share, f'(h) = share + h · slope."""
    share = 1 / (1 + tl.exp(-h * (1.5957691216057308 + 0.07135481627159436 * h * h)))
    return share, share * (1 - share) * (1.5957691216057308 + 0.21406444881478308 * h * h)


@triton.jit
def _columns(tile):
    """The PARTS of a tile's columns, from left to right."""
    left, right = tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))
    a, b = tl.split(tl.permute(tl.reshape(left, [left.shape[0], 2, left.shape[1] // 2]), [0, 2, 1]))
    c, d = tl.split(tl.permute(tl.reshape(right, [right.shape[0], 2, right.shape[1] // 2]), [0, 2, 1]))
    return a, b, c, d


@triton.jit
def up_kernel(
    x_desc, up_desc, up_bias_ptr, hidden_desc, act_desc,
    E: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """hidden (where there is a hidden_desc) and act of one tile."""
    first_t = tl.program_id(0) // tl.cdiv(M, BLOCK_M) * BLOCK_T
    first_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for first_e in range(0, E, BLOCK_E):
        x = x_desc.load([first_t, first_e])  # [BLOCK_T, BLOCK_E]
        acc = tl.dot(x, up_desc.load([first_m, first_e]).T, acc)

    if up_bias_ptr is not None:
        offs_m = first_m + tl.arange(0, BLOCK_M)
        acc += tl.load(up_bias_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)[None, :]
    parts = _columns(acc)
    for part in tl.static_range(PARTS):
        m = first_m + part * (BLOCK_M // PARTS)
        hidden = parts[part].to(act_desc.dtype)
        if hidden_desc is not None:
            hidden_desc.store([first_t, m], hidden)
        h = hidden.to(tl.float32)
        share, _ = _gelu(h)
        act_desc.store([first_t, m], (h * share).to(act_desc.dtype))


@triton.jit(do_not_specialize=["tokens"])
def down_backward_kernel(
    dout_desc, down_desc, hidden_ptr, act_desc, dhidden_desc, dup_bias_ptr,
    tokens, E: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """act and dhidden of one tile, and dhidden's column sums."""
    row = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    first_t = row * BLOCK_T
    first_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M
    WIDTH: tl.constexpr = BLOCK_M // PARTS
    offs_t = first_t + tl.arange(0, BLOCK_T)
    hidden = ()
    for part in tl.static_range(PARTS):  # loaded before the product, behind which it arrives
        offs_m = first_m + part * WIDTH + tl.arange(0, WIDTH)
        mask = (offs_t < tokens)[:, None] & (offs_m < M)[None, :]
        offs = offs_t.to(tl.int64)[:, None] * M + offs_m[None, :]
        hidden += (tl.load(hidden_ptr + offs, mask=mask, other=0.0),)  # [BLOCK_T, WIDTH]
    dact = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for first_e in range(0, E, BLOCK_E):
        dact = tl.dot(dout_desc.load([first_t, first_e]), down_desc.load([first_e, first_m]), dact)

    parts = _columns(dact)
    for part in tl.static_range(PARTS):
        m = first_m + part * WIDTH
        h = hidden[part].to(tl.float32)
        share, slope = _gelu(h)
        dh = parts[part] * (share + h * slope)
        act_desc.store([first_t, m], (h * share).to(act_desc.dtype))
        dhidden_desc.store([first_t, m], dh.to(act_desc.dtype))
        if dup_bias_ptr is not None:
            offs_m = m + tl.arange(0, WIDTH)
            tl.store(dup_bias_ptr + row.to(tl.int64) * M + offs_m, tl.sum(dh, 0), mask=offs_m < M)


def choose_config(arch: int) -> dict[str, int] | None:
    """Launch choice of both kernels; None where torch's products and passes for the activation are taken.

    H100, bfloat16, "gelu_tanh", µs for B/16, L/16, So400m (65,536 × 768 × 3072, 32,768 × 1024 × 4096, 33,024 × 1152 ×
    4304) against torch's product and its passes: hidden and act 700, 563, 652 (706, 596, 718); act alone 638 (706);
    act and dhidden 870, 713, 816 (1192, 928, 1047). Of 24 and 16 launches; with 8 warps a program and larger tiles both
    are slower, and so is the second that loads hidden behind its product: 1055, 797, 992. The products alone take 439
    to 573: these kernels run at 350 to 510 TFLOP/s, where cuBLAS's run at 540 to 700. Elsewhere not measured.
    """
    if arch != 90:
        return None
    return {"BLOCK_T": 128, "BLOCK_M": 128, "BLOCK_E": 64, "num_warps": 4, "num_stages": 3}


def fused_config(x_TE: Tensor, mlp_width: int, activation: str) -> dict[str, int] | None:
    """The launch choice, or None where torch does it: other activations, float32, rows that are not 16-byte aligned."""
    fits = x_TE.itemsize == 2 and x_TE.shape[1] % 8 == 0 and mlp_width % 8 == 0 and x_TE.numel() > 0
    if not fits or activation != "gelu_tanh":
        return None
    return choose_config(90 if x_TE.device.type == "cpu" else architecture(x_TE.device))  # interpreted: Hopper's path


def _blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What a kernel loads and stores blocks of a matrix through."""
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _activate_torch(hidden_TU: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate_TM, value_TM = hidden_TU.chunk(2, 1)
        return torch.nn.functional.silu(gate_TM) * value_TM
    return torch.nn.functional.gelu(hidden_TU, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward_torch(dact_TM: Tensor, hidden_TU: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate_TM, value_TM = hidden_TU.chunk(2, 1)
        dgate_TM = torch.ops.aten.silu_backward(dact_TM * value_TM, gate_TM)
        return torch.cat([dgate_TM, dact_TM * torch.nn.functional.silu(gate_TM)], 1)
    return torch.ops.aten.gelu_backward(dact_TM, hidden_TU, approximate="tanh" if activation == "gelu_tanh" else "none")


def feed_forward(
    x_TE: Tensor,
    up_UE: Tensor,
    down_EM: Tensor,
    up_bias_U: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and hidden (empty unless kept)."""
    (tokens, width), (_, mlp_width) = x_TE.shape, down_EM.shape
    config = fused_config(x_TE, mlp_width, activation)
    if config is None:
        hidden_TU = linear(x_TE, up_UE, up_bias_U)
        act_TM = _activate_torch(hidden_TU, activation)
    else:
        block_t, block_m, block_e = config["BLOCK_T"], config["BLOCK_M"], config["BLOCK_E"]
        hidden_TU = x_TE.new_empty(tokens, mlp_width) if keep_hidden else None
        act_TM = x_TE.new_empty(tokens, mlp_width)
        up_kernel[(triton.cdiv(tokens, block_t) * triton.cdiv(mlp_width, block_m),)](
            _blocks(x_TE, block_t, block_e), _blocks(up_UE, block_m, block_e), up_bias_U,
            None if hidden_TU is None else _blocks(hidden_TU, block_t, block_m // PARTS.value),
            _blocks(act_TM, block_t, block_m // PARTS.value),
            width, mlp_width, **config,
        )  # fmt: skip
    out_TE = linear(act_TM, down_EM, down_bias_E)
    return out_TE, hidden_TU if keep_hidden else x_TE.new_empty(0, len(up_UE))


def feed_forward_backward(
    dout_TE: Tensor,
    x_TE: Tensor,
    hidden_TU: Tensor,
    up_UE: Tensor,
    down_EM: Tensor,
    up_bias_U: Tensor | None,
    activation: str,
    weight_grads: bool,
    down_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dup, ddown, and in float32 dup_bias and ddown_bias; empty what is not wanted or has no bias. An empty
    hidden is computed again."""
    (tokens, width), (_, mlp_width) = x_TE.shape, down_EM.shape
    if len(hidden_TU) < tokens:
        hidden_TU = linear(x_TE, up_UE, up_bias_U)
    bias_grad = weight_grads and up_bias_U is not None
    config = fused_config(x_TE, mlp_width, activation)
    if config is None:
        act_TM = _activate_torch(hidden_TU, activation)
        dhidden_TU = _activate_backward_torch(dout_TE @ down_EM, hidden_TU, activation)
        partial_GU = dhidden_TU if bias_grad else None
    else:
        block_t, block_m, block_e = config["BLOCK_T"], config["BLOCK_M"], config["BLOCK_E"]
        rows = triton.cdiv(tokens, block_t)
        act_TM, dhidden_TU = x_TE.new_empty(tokens, mlp_width), torch.empty_like(hidden_TU)
        partial_GU = x_TE.new_empty(rows, len(up_UE), dtype=torch.float32) if bias_grad else None
        down_backward_kernel[(rows * triton.cdiv(mlp_width, block_m),)](
            _blocks(dout_TE, block_t, block_e), _blocks(down_EM, block_e, block_m), hidden_TU.contiguous(),
            *(_blocks(tensor, block_t, block_m // PARTS.value) for tensor in (act_TM, dhidden_TU)), partial_GU,
            tokens, width, mlp_width, **config,
        )  # fmt: skip
    ddown_EM = dout_TE.T @ act_TM if weight_grads else x_TE.new_empty(0)
    del act_TM  # frees what the next products write
    dup_UE = dhidden_TU.T @ x_TE if weight_grads else x_TE.new_empty(0)
    dup_bias_U = (
        x_TE.new_empty(0, dtype=torch.float32) if partial_GU is None else partial_GU.sum(0, dtype=torch.float32)
    )
    down_bias = dout_TE if weight_grads and down_bias_grad else dout_TE[:, :0]
    return dhidden_TU @ up_UE, dup_UE, ddown_EM, dup_bias_U, down_bias.sum(0, dtype=torch.float32)
