"""What bench_self_attention compares: cases, inputs, contenders, and the check of each against the reference.

T tokens, S images, H heads, D head width, L tokens of an image.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Row, assert_same_function, ceilings
from peers import Attend, Pack
from torch import Tensor

from navit_kernels import HeadNorm, plan_pack, varlen_attention
from navit_kernels.self_attention import reference
from navit_kernels.testing import assert_error_within, cu_seqlens_of

ITEMSIZE = 2  # bytes of a bf16 element


class Case(NamedTuple):
    name: str
    heads: int
    head_dim: int
    lengths: tuple[int, ...]

    def flops(self, direction: str) -> float:
        products = {"fwd": 2, "bwd": 5}[direction]
        return 2.0 * products * self.head_dim * self.heads * sum(length**2 for length in self.lengths)

    def floor_us(self, direction: str) -> float:
        tensors = {"fwd": 4, "bwd": 7}[direction]
        bytes_moved = ITEMSIZE * tensors * sum(self.lengths) * self.heads * self.head_dim
        return ceilings().floor_us(bytes_moved, self.flops(direction))

    @property
    def shape(self) -> Row:
        return {"case": self.name, "heads": self.heads, "head_dim": self.head_dim, "dtype": "bf16"}

    def pack(self, device: str) -> Pack:
        return Pack(self.lengths, cu_seqlens_of(list(self.lengths), device))


@dataclass(frozen=True)
class Inputs:
    """q, k, v: views of one (T, 3, H, D) bf16 tensor; both norm weights (D,) float32; all of them leaves."""

    q_THD: Tensor
    k_THD: Tensor
    v_THD: Tensor
    q_weight_D: Tensor
    k_weight_D: Tensor
    dout_THD: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_THD, self.k_THD, self.v_THD

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.q_weight_D, self.k_weight_D


def make_inputs(tokens: int, heads: int, head_dim: int, device: str, seed: int = 0) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    randn = functools.partial(torch.randn, generator=rng, device=device)
    qkv_T3HD = randn(tokens, 3, heads, head_dim, dtype=torch.bfloat16)
    weights = [(1 + 0.1 * randn(head_dim)).requires_grad_() for _ in range(2)]
    dout_THD = randn(tokens, heads, head_dim, dtype=torch.bfloat16)
    return Inputs(*(x_THD.requires_grad_() for x_THD in qkv_T3HD.unbind(1)), *weights, dout_THD)


# The contenders


def our_attention(pack: Pack, qk_norm: str, backend: str = "auto") -> Callable[[Inputs], Tensor]:
    plan = plan_pack(pack.lengths, pack.cu_seqlens.device)

    def run(x: Inputs) -> Tensor:
        norms = {}
        if qk_norm != "none":
            norms = {"q_norm": HeadNorm(qk_norm, x.q_weight_D), "k_norm": HeadNorm(qk_norm, x.k_weight_D)}
        return varlen_attention(*x.qkv, pack.cu_seqlens, plan=plan, backend=backend, **norms)

    return run


def norm_qk(q_THD: Tensor, k_THD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of q and of k over D, in float32, back in their dtype: what peers need before their attention."""
    pairs = ((q_THD, q_weight_D), (k_THD, k_weight_D))
    q_THD, k_THD = (F.layer_norm(x.float(), x.shape[-1:], weight, eps=1e-6).to(x.dtype) for x, weight in pairs)
    return q_THD, k_THD


@functools.cache
def compiled_norm_qk() -> Callable[..., tuple[Tensor, Tensor]]:
    from torch._functorch import config

    config.donated_buffer = False  # a timed backward runs many times after one forward
    torch._dynamo.config.recompile_limit = 64  # one compilation per shape, with and without gradients
    return torch.compile(norm_qk, dynamic=False, fullgraph=True)


def peer_attention(attend: Attend, qk_norm: str, norm: Callable = norm_qk) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        q_THD, k_THD, v_THD = x.qkv
        if qk_norm != "none":
            q_THD, k_THD = norm(q_THD, k_THD, *x.weights)
        return attend(q_THD, k_THD, v_THD)

    return run


def leaves(x: Inputs, qk_norm: str) -> tuple[Tensor, ...]:
    return x.qkv if qk_norm == "none" else (*x.qkv, *x.weights)


def forward_backward(run: Callable[[Inputs], Tensor], x: Inputs, qk_norm: str) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k, v and, with norms, of both weights."""
    out_THD = run(x)
    return (out_THD.detach(), *torch.autograd.grad(out_THD, leaves(x, qk_norm), x.dout_THD))


# Correctness


def sample_images(lengths: Sequence[int], tokens: int = 1024) -> list[int]:
    """Indices of some images: the longest, then the shortest, first and last, then others while `tokens` allows."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen: list[int] = []
    for image in [by_length[-1], by_length[0], 0, len(lengths) - 1, *range(7, len(lengths), 7)]:
        if image not in chosen and (not chosen or sum(lengths[i] for i in chosen) + lengths[image] <= tokens):
            chosen.append(image)
    return sorted(chosen)


class Expected:
    """What one case must give, computed by the reference for a sample of its images: in float64, and in bf16."""

    def __init__(self, case: Case, qk_norm: str, device: str) -> None:
        self.case, self.qk_norm = case, qk_norm
        self.x = make_inputs(sum(case.lengths), case.heads, case.head_dim, device)
        images = sample_images(case.lengths)
        rows = torch.arange(sum(case.lengths), device=device).split(case.lengths)
        self.rows_T = torch.cat([rows[image] for image in images])
        qkv_T3HD = torch.stack([part.detach() for part in self.x.qkv], 1)[self.rows_T]
        parts = [part.requires_grad_() for part in qkv_T3HD.unbind(1)]
        self.sample = Inputs(*parts, *self.x.weights, self.x.dout_THD[self.rows_T])
        lengths = [case.lengths[image] for image in images]
        self.pack, self.sample_pack = case.pack(device), Pack(lengths, cu_seqlens_of(lengths, device))
        self.exact, self.at_dtype = self._by_reference(torch.float64), self._by_reference(torch.bfloat16)

    def _by_reference(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        s, wide = self.sample, torch.float64 if dtype == torch.float64 else torch.float32
        qkv = (part.detach().to(dtype).requires_grad_() for part in s.qkv)
        weights = (weight.detach().to(wide).requires_grad_() for weight in s.weights)

        def run(x: Inputs) -> Tensor:
            norms = {}
            if self.qk_norm != "none":
                norms = {"q_norm": HeadNorm(self.qk_norm, x.q_weight_D), "k_norm": HeadNorm(self.qk_norm, x.k_weight_D)}
            return reference.varlen_attention(*x.qkv, self.sample_pack.cu_seqlens, **norms)[0]

        return forward_backward(run, Inputs(*qkv, *weights, s.dout_THD.to(dtype)), self.qk_norm)

    def check(self, name: str, prepare: Callable[[Pack], Callable[[Inputs], Tensor]], exactly: bool) -> None:
        """Raise AssertionError unless the sample alone, and the sample's rows in the whole pack, come out right.

        exactly: within the project's error bound; otherwise only as the same function.
        """
        alone = forward_backward(prepare(self.sample_pack), self.sample, self.qk_norm)
        whole = forward_backward(prepare(self.pack), self.x, self.qk_norm)[:4]
        results = [*alone, *(part[self.rows_T] for part in whole)]
        labels = ("out", "dq", "dk", "dv", "dq_weight", "dk_weight")[: len(alone)]
        labels = [*labels, *(f"{label} in the whole pack" for label in labels[:4])]
        for index, (label, actual) in enumerate(zip(labels, results, strict=True)):
            part = index if index < len(alone) else index - len(alone)
            label = f"{name} {self.case.name} {self.case.heads}×{self.case.head_dim} {self.qk_norm} {label}"
            if exactly:
                assert_error_within(actual, self.exact[part], self.at_dtype[part], label)
            else:
                assert_same_function(label, actual, self.exact[part])
