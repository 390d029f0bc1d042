"""The meaning of feed_forward, in plain torch. T tokens, E model width, M MLP width, U hidden width (M or 2M)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, linear, silu


def feed_forward(
    x_TE: Tensor,
    up_UE: Tensor,
    down_EM: Tensor,
    up_bias_U: Tensor | None = None,
    down_bias_E: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    """Return f(x · upᵀ + up_bias) · downᵀ + down_bias."""
    return linear(activate(linear(x_TE, up_UE, up_bias_U), activation), down_EM, down_bias_E)


def activate(hidden_TU: Tensor, activation: str) -> Tensor:
    """f of (T, U): (T, M)."""
    if activation == "swiglu":
        gate_TM, value_TM = hidden_TU.chunk(2, 1)
        return silu(gate_TM) * value_TM
    return gelu(hidden_TU, approximate="tanh" if activation == "gelu_tanh" else "none")
