"""An MLP whose activation costs no pass of its own, forward and backward.

    hidden = x @ upᵀ + up_bias         rounded to x's dtype; for "swiglu" (T, 2M): gates, then values
    act    = f(hidden)                 rounded
    out    = act @ downᵀ + down_bias

    f(h) = h · Φ(h)                                          "gelu", Φ(h) = (1 + erf(h / √2)) / 2
    f(h) = h · σ(2 √(2/π) (h + 0.044715 h³))                 "gelu_tanh", in which (1 + tanh y) / 2 = σ(2y)
    f(gate, value) = gate · σ(gate) · value                  "swiglu"

Backward, with dact = dout @ down, which stays in registers:

    dhidden = f'(hidden) · dact        f'(h) = Φ(h) + h φ(h), or σ + h σ (1 − σ) d(2y)/dh
    dgate = dact · value · σ (1 + gate (1 − σ))        dvalue = dact · gate · σ
    dx = dhidden @ up        dup = dhiddenᵀ @ x        ddown = doutᵀ @ act
    dup_bias = Σ_tokens dhidden        ddown_bias = Σ_tokens dout

`up_kernel` writes hidden and act behind its product, `down_backward_kernel` reads hidden and writes act (again: it was
not kept) and dhidden behind its own; so the forward moves hidden once instead of twice, and dact never moves. All other
products are cuBLAS's. dup_bias sums over each row of tiles, then over the rows: no atomics, the same bits every time.

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

PARTS = tl.constexpr(4)  # of a tile's columns: an epilogue holds one of them in registers at a time


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _gelu(h, ACTIVATION: tl.constexpr):
    """(share, slope): f(h) = h · share, f'(h) = share + h · slope."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * h * h)
        t = 1 / (1 + 0.23164189 * tl.abs(h))  # erf to 1.5e-7: Abramowitz, Stegun, 7.1.26
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        tail *= density  # Φ(−|h|)
        return tl.where(h > 0, 1 - tail, tail), 0.3989422804014327 * density
    else:
        share = _sigmoid(h * (1.5957691216057308 + 0.07135481627159436 * h * h))
        return share, share * (1 - share) * (1.5957691216057308 + 0.21406444881478308 * h * h)


@triton.jit
def _columns(tile):
    """The PARTS of a tile's columns, from left to right."""
    left, right = tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))
    a, b = tl.split(tl.permute(tl.reshape(left, [left.shape[0], 2, left.shape[1] // 2]), [0, 2, 1]))
    c, d = tl.split(tl.permute(tl.reshape(right, [right.shape[0], 2, right.shape[1] // 2]), [0, 2, 1]))
    return a, b, c, d


@triton.jit
def _add_bias(tile, bias_ptr, first_m, M):
    if bias_ptr is not None:
        offs_m = first_m + tl.arange(0, tile.shape[1])
        tile += tl.load(bias_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def _store_sum(ptr, tile, first_m, M):
    if ptr is not None:
        offs_m = first_m + tl.arange(0, tile.shape[1])
        tl.store(ptr + offs_m, tl.sum(tile, 0), mask=offs_m < M)


@triton.jit
def up_kernel(
    x_desc, up_desc, up_bias_ptr, value_up_desc, value_up_bias_ptr, hidden_desc, value_desc, act_desc,
    E, M, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """hidden and act of one tile. For "swiglu", hidden and up are the gates; the values have arguments of their own."""
    first_t = tl.program_id(0) // tl.cdiv(M, BLOCK_M) * BLOCK_T
    first_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    value_acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for first_e in range(0, E, BLOCK_E):
        x = x_desc.load([first_t, first_e])  # [BLOCK_T, BLOCK_E]
        acc = tl.dot(x, up_desc.load([first_m, first_e]).T, acc)
        if ACTIVATION == "swiglu":
            value_acc = tl.dot(x, value_up_desc.load([first_m, first_e]).T, value_acc)

    parts = _columns(_add_bias(acc, up_bias_ptr, first_m, M))
    if ACTIVATION == "swiglu":
        value_parts = _columns(_add_bias(value_acc, value_up_bias_ptr, first_m, M))
    for part in tl.static_range(PARTS):
        m = first_m + part * (BLOCK_M // PARTS)
        hidden = parts[part].to(act_desc.dtype)
        h = hidden.to(tl.float32)
        if hidden_desc is not None:
            hidden_desc.store([first_t, m], hidden)
        if ACTIVATION == "swiglu":
            value = value_parts[part].to(act_desc.dtype)
            if hidden_desc is not None:
                value_desc.store([first_t, m], value)
            act = h * _sigmoid(h) * value.to(tl.float32)
        else:
            share, _ = _gelu(h, ACTIVATION)
            act = h * share
        act_desc.store([first_t, m], act.to(act_desc.dtype))


@triton.jit
def down_backward_kernel(
    dout_desc, down_desc, hidden_desc, value_desc, act_desc, dhidden_desc, dvalue_desc, dup_bias_ptr,
    E, M, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """act and dhidden of one tile, and its column sums."""
    row = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    first_t = row * BLOCK_T
    first_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M
    dact = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for first_e in range(0, E, BLOCK_E):
        dact = tl.dot(dout_desc.load([first_t, first_e]), down_desc.load([first_e, first_m]), dact)

    parts = _columns(dact)
    if dup_bias_ptr is not None:
        dup_bias_ptr += row.to(tl.int64) * (2 * M if ACTIVATION == "swiglu" else M)
    for part in tl.static_range(PARTS):
        m = first_m + part * (BLOCK_M // PARTS)
        h = hidden_desc.load([first_t, m]).to(tl.float32)
        if ACTIVATION == "swiglu":
            value = value_desc.load([first_t, m]).to(tl.float32)
            share = _sigmoid(h)
            act = h * share * value
            dh = parts[part] * value * share * (1 + h * (1 - share))
            dvalue = parts[part] * h * share
            dvalue_desc.store([first_t, m], dvalue.to(act_desc.dtype))
            if dup_bias_ptr is not None:
                _store_sum(dup_bias_ptr + M, dvalue, m, M)
        else:
            share, slope = _gelu(h, ACTIVATION)
            act = h * share
            dh = parts[part] * (share + h * slope)
        act_desc.store([first_t, m], act.to(act_desc.dtype))
        dhidden_desc.store([first_t, m], dh.to(act_desc.dtype))
        _store_sum(dup_bias_ptr, dh, m, M)


def choose_config(arch: int, gated: bool) -> dict[str, int] | None:
    """Launch choice of both kernels; None where torch's products and a pass for the activation are as good."""
    if arch != 90:
        return None
    return {"BLOCK_T": 128, "BLOCK_M": 64 if gated else 128, "BLOCK_E": 64, "num_warps": 4, "num_stages": 3}


def architecture(device: torch.device) -> int:
    """Compute capability × 10; 0 where there is none. The interpreter takes Hopper's path."""
    if device.type == "cpu":
        return 90
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def fused_config(x_TE: Tensor, mlp_width: int, activation: str) -> dict[str, int] | None:
    """The launch choice, or None where the kernels cannot take the tensors or are not worth it."""
    if x_TE.itemsize != 2 or x_TE.shape[1] % 8 or mlp_width % 8 or x_TE.numel() == 0:
        return None
    return choose_config(architecture(x_TE.device), activation == "swiglu")


def _blocks(tensor: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    """What a kernel loads and stores blocks of a matrix through."""
    if tensor is None:
        return None
    if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.data_ptr() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _gates_and_values(tensor: Tensor | None, axis: int, activation: str) -> tuple[Tensor | None, Tensor | None]:
    """Halves of what has an axis of width U; the tensor and None where nothing gates."""
    if tensor is None or activation != "swiglu":
        return tensor, None
    gates, values = tensor.chunk(2, axis)
    return gates, values


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
        hidden_TU = x_TE.new_empty(tokens, len(up_UE)) if keep_hidden else None
        act_TM = x_TE.new_empty(tokens, mlp_width)
        ups, values_up = (_blocks(part, block_m, block_e) for part in _gates_and_values(up_UE, 0, activation))
        bias, values_bias = _gates_and_values(up_bias_U, 0, activation)
        tiles = (*_gates_and_values(hidden_TU, 1, activation), act_TM)
        up_kernel[(triton.cdiv(tokens, block_t) * triton.cdiv(mlp_width, block_m),)](
            _blocks(x_TE, block_t, block_e), ups, bias, values_up, values_bias,
            *(_blocks(tile, block_t, block_m // PARTS.value) for tile in tiles),
            width, mlp_width, ACTIVATION=activation, **config,
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
        partial_GU = dhidden_TU.float() if bias_grad else None
    else:
        block_t, block_m, block_e = config["BLOCK_T"], config["BLOCK_M"], config["BLOCK_E"]
        rows = triton.cdiv(tokens, block_t)
        act_TM, dhidden_TU = x_TE.new_empty(tokens, mlp_width), torch.empty_like(hidden_TU)
        partial_GU = x_TE.new_empty(rows, len(up_UE), dtype=torch.float32) if bias_grad else None
        tiles = _gates_and_values(hidden_TU, 1, activation), (act_TM,), _gates_and_values(dhidden_TU, 1, activation)
        down_backward_kernel[(rows * triton.cdiv(mlp_width, block_m),)](
            _blocks(dout_TE, block_t, block_e), _blocks(down_EM, block_e, block_m),
            *(_blocks(tile, block_t, block_m // PARTS.value) for group in tiles for tile in group), partial_GU,
            width, mlp_width, ACTIVATION=activation, **config,
        )  # fmt: skip
    ddown_EM = dout_TE.T @ act_TM if weight_grads else x_TE.new_empty(0)
    del act_TM  # frees what the next products write
    dup_UE = dhidden_TU.T @ x_TE if weight_grads else x_TE.new_empty(0)
    dup_bias_U = x_TE.new_empty(0, dtype=torch.float32) if partial_GU is None else partial_GU.sum(0)
    down_bias = dout_TE if weight_grads and down_bias_grad else dout_TE[:, :0]
    return dhidden_TU @ up_UE, dup_UE, ddown_EM, dup_bias_U, down_bias.sum(0, dtype=torch.float32)
