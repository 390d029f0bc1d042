"""Signature: what of a call its kernels are compiled for. T tokens, H heads, D head width."""

from __future__ import annotations

import math

import torch

from .._jit import triton_version
from ..head_norm import NORM_CODES
from ..plan import CLASSES
from .config import ClassConfig, choose_config, split_head_dim


def strided(**strides: tuple[int, ...]) -> dict:
    """Strides of (T, H, D) tensors over tokens and heads: q_stride_t and q_stride_h, the latter in UNITs.

    A head width of 72 is a multiple of 8 but not of 16; only with the 8 spelled out do loads take 16 bytes.
    """
    unit = 8 if all(stride[1] % 8 == 0 for stride in strides.values()) else 1
    args = dict(UNIT=unit)
    for name, stride in strides.items():
        args[f"{name}_stride_t"], args[f"{name}_stride_h"] = stride[0], stride[1] // unit
    return args


class Signature:
    """What of a call does not change with its tokens, lengths and addresses: what its kernels are compiled for."""

    def __init__(
        self, arch: int, dtype: torch.dtype, heads: int, width: int, q: tuple[int, ...], k: tuple[int, ...],
        v: tuple[int, ...], q_kind: int, q_weight: int, q_bias: int, q_eps: float, k_kind: int, k_weight: int,
        k_eps: float, softmax_scale: float,
    ) -> None:  # fmt: skip
        """q, k, v: their strides. q_weight, q_bias, k_weight: how many dimensions; 0 for None."""
        self.arch, self.bits, self.heads, self.width = arch, dtype.itemsize * 8, heads, width
        self.softmax_scale = softmax_scale
        first, second = split_head_dim(width)
        centred = k_kind == NORM_CODES["layer_norm"]  # K's mean leaves the scores by way of u
        self.fold = q_kind != 0 or centred or max(q_weight, q_bias, k_weight) > 0
        self.shift = q_bias > 0
        self.fold_scale = softmax_scale * math.log2(math.e)
        self.score_scale = 1.0 if self.fold else self.fold_scale
        self.key_factor = math.log(2) if self.fold else softmax_scale
        self.precision = "ieee" if self.bits == 32 else "tf32"
        self.shape = dict(H=heads, D=width, D1=first, D2=second)
        self.strides = strided(q=q, k=k, v=v)
        self.weights: dict = {}
        for name, rank in (("q_weight", q_weight), ("q_bias", q_bias), ("k_weight", k_weight)):
            self.weights |= {f"{name}_stride": width if rank == 2 else 0, name.upper(): rank > 0}
        self.norm_numbers = dict(q_eps=q_eps, k_eps=k_eps, Q_NORM=q_kind, K_NORM=k_kind, FOLD=self.fold)
        self.scores = dict(fold_scale=self.fold_scale, score_scale=self.score_scale)
        self.score_gradients = dict(softmax_scale=softmax_scale, key_factor=self.key_factor)
        self.wide_range = dtype != torch.float16  # so that P may stand under a fixed maximum
        self.bounds_scores = k_kind != 0 and self.wide_range  # so that there is one ahead of all scores
        # by class, without and with Hopper's own kernels; and the classes that have some
        portable, own = ([self.config(c, gluon) for c in range(CLASSES)] for gluon in (False, True))
        self.forward_configs = (portable, own)
        self.hopper_forward = {c for c in range(CLASSES) if own[c].forward != portable[c].forward}
        self.hopper = self.hopper_forward | {c for c in range(CLASSES) if own[c].backward != portable[c].backward}

    def config(self, index: int, gluon: bool = False, gluon_backward: bool | None = None) -> ClassConfig:
        return choose_config(self.arch, self.width, index, self.bits, gluon, gluon_backward, triton_version())
