"""HeadNorm: what q_norm and k_norm take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._checks import check_option, check_same, fail

KINDS = ("layer_norm", "rms_norm", "l2")
NORM_CODES = {kind: code for code, kind in enumerate((None, *KINDS))}  # as the kernels know them


@dataclass(frozen=True)
class HeadNorm:
    """A normalization over the head dimension D, applied to q or k inside attention.

    kind:
        "layer_norm"  (x − mean) · rsqrt(var + eps) · weight + bias
        "rms_norm"    x · rsqrt(mean(x²) + eps) · weight + bias
        "l2"          x / max(‖x‖₂, eps) · √D · weight + bias
    weight: (D,) shared by all heads, (H, D) per head, or None for ones.
    bias: of the same forms, or None. On the key side of a softmax a bias adds the same number to all scores of a
        query: it changes no output and its gradient is exactly zero.
    eps: 1e-6 by default, 1e-12 for "l2".
    """

    kind: str = "layer_norm"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        check_option("HeadNorm kind", self.kind, KINDS)
        if self.eps is None:
            object.__setattr__(self, "eps", 1e-12 if self.kind == "l2" else 1e-6)
        if self.eps <= 0:
            fail("HeadNorm eps", "greater than 0", self.eps)


def check_head_norm(name: str, norm: HeadNorm | None, like_name: str, like: Tensor) -> None:
    """Check a norm against the (T, H, D) tensor that it applies to."""
    if norm is None:
        return
    if not isinstance(norm, HeadNorm):
        fail(name, "a HeadNorm or None", type(norm).__name__)
    heads, width = like.shape[-2:]
    for part, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in ((width,), (heads, width)):
            fail(f"{name}.{part}", f"(D,) = ({width},) or (H, D) = ({heads}, {width})", tuple(tensor.shape))
        check_same(f"{name}.{part}", tensor, like_name, like, dtype=False)
