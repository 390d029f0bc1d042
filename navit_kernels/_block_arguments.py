"""What a block takes. T tokens, S images, E model width, H heads, D head width."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .head_norm import NORM_CODES


class Parameters(NamedTuple):
    """Of a block and of the norm that follows it, by their names above; None where there is none of that name.

    qkv: (3HD, E), rows for q, then for k, then for v; or the same in two or three parts, qkv, qkv_2 and qkv_3.
    out, up, down, biases: as feed_forward takes them, nn.Linear's layout. All are brought to normed's dtype.
    q_weight and so on: of the norms of q and k: (D,), (H, D) or (H, 1, D).
    """

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    norm_weight: Tensor
    following_weight: Tensor
    qkv_2: Tensor | None = None
    qkv_3: Tensor | None = None
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    norm_bias: Tensor | None = None
    following_bias: Tensor | None = None
    scale_1: Tensor | None = None
    scale_2: Tensor | None = None


class Options(NamedTuple):
    """Of a block. Kinds are NORM_CODES of the norms of q and k; centred: of the stream's, layer norm or RMS norm;
    recompute: as feed_forward takes it."""

    heads: int
    softmax_scale: float
    activation: str
    q_kind: int = NORM_CODES[None]
    q_eps: float = 1e-6
    k_kind: int = NORM_CODES[None]
    k_eps: float = 1e-6
    norm_centred: bool = True
    norm_eps: float = 1e-6
    following_centred: bool = True
    following_eps: float = 1e-6
    recompute: bool = False


class Layers(NamedTuple):
    """Modules that must be called, because they do more than multiply by their weights (`only_multiply`): from normed
    tokens to q, k and v, (T, E) → (T, 3HD); from the heads' results to a branch; and the MLP."""

    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


class Work(NamedTuple):
    """A plan's lists, those on the host as a tensor or as numbers; and per image how much of either branch is kept, or
    None for all."""

    items: Tensor
    offsets: Tensor
    host_offsets: Tensor | None
    cu_seqlens: Tensor
    keep_1: Tensor | None
    keep_2: Tensor | None


def only_multiply(*layers: nn.Module) -> bool:
    """Whether a block may take layers' weights without calling them: each is nn.Linear itself, and without hooks."""
    return all(
        type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )
