"""What varlen_attention accepts. T tokens, H heads, D head width, S segments (images)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_dtype, check_equal, check_option, check_same, check_shape, fail
from .._direct import skips_dispatcher
from ..head_norm import NORM_CODES, HeadNorm, check_head_norm
from ..plan import PackPlan
from .config import SUPPORTED_HEAD_DIMS

if TYPE_CHECKING:
    from .launch import Signature

BACKENDS = ("auto", "reference", "triton", "fa3", "fa4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_NORM = HeadNorm()


@functools.cache
def launchers() -> Any:
    """launch.py, and with it Triton, once it is needed. An import statement in a function takes the host over a µs."""
    from . import launch

    return launch


def takes_reference(backend: str, q_THD: Tensor) -> bool:
    check_option("backend", backend, BACKENDS)
    if backend not in ("auto", "reference") and q_THD.device.type == "cpu":
        fail("q", f"on a GPU for backend={backend!r}", q_THD.device)
    return backend == "reference" or (backend == "auto" and q_THD.device.type == "cpu")


def check_inputs(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cross: bool) -> None:
    """Shapes, dtypes and devices. What nearly every call brings is accepted first, at little cost."""
    if isinstance(q_THD, Tensor) and isinstance(k_THD, Tensor) and isinstance(v_THD, Tensor) and q_THD.dim() == 3:
        shape, dtype, device = q_THD.shape, q_THD.dtype, q_THD.device
        same_k = k_THD.shape == shape and k_THD.dtype == dtype and k_THD.device == device
        if same_k and v_THD.shape == shape and v_THD.dtype == dtype and v_THD.device == device:
            return
    check_shape("q", q_THD, (None, None, None), "(T, H, D)")
    heads, width = q_THD.shape[1:]
    for name, tensor in (("k", k_THD), ("v", v_THD)):
        check_shape(name, tensor, (None, None, width), "(T, H, D)")
        if tensor.shape[1] != heads:
            fail(name, f"of q's head count {heads} (grouped and multi-query heads are not supported)", tensor.shape[1])
        check_same(name, tensor, "q", q_THD)
    check_shape("v", v_THD, k_THD.shape, "(T, H, D)")
    if not cross:
        check_shape("k", k_THD, q_THD.shape, "(T, H, D)")


_known: dict[tuple, Signature] = {}  # of the calls that passed, by _key


def check_call(
    tensors: tuple[Tensor, ...], cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q_norm: HeadNorm | None,
    k_norm: HeadNorm | None, plan: PackPlan | None, backend: str, scale: float,
) -> Signature | None:  # fmt: skip
    """Check what is left to check of a call on (q, k, v) or (qkv,). Eager calls of kernels on a GPU also get their
    Signature, and are checked the first time alone: all packs of one model have one key."""
    arguments = (tensors, cu_seqlens, cu_seqlens_k, q_norm, k_norm, plan, backend)
    key = _key(*arguments, scale) if tensors[0].is_cuda and skips_dispatcher(tensors[0]) else None
    signature = None if key is None else _known.get(key)
    if signature is None:
        _check_arguments(*arguments)
        if key is not None and backend in ("auto", "triton"):
            if len(_known) >= 1024:  # strides over heads may change with the number of tokens
                _known.clear()
            norms = launchers().Norms(*norm_fields(q_norm, k_norm))
            signature = _known[key] = launchers().signature_of(*sides(*tensors), norms, scale)
    return signature


def _key(
    tensors: tuple[Tensor, ...], cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q_norm: HeadNorm | None,
    k_norm: HeadNorm | None, plan: PackPlan | None, backend: str, scale: float,
) -> tuple | None:  # fmt: skip
    """All that _check_arguments and signature_of look at; None where an argument is not even of its type."""
    if not isinstance(cu_seqlens, Tensor):
        return None
    first, segments = tensors[0], cu_seqlens.shape
    key: list = [backend, scale, first.dtype, first.device, first.shape[1:], cu_seqlens.dtype, cu_seqlens.device]
    key.append(len(segments) == 1 and segments[0] > 0)
    for tensor in tensors:
        key.append(tensor.stride())
    if cu_seqlens_k is not None:
        if not isinstance(cu_seqlens_k, Tensor):
            return None
        key += (cu_seqlens_k.dtype, cu_seqlens_k.device, cu_seqlens_k.shape == segments)
    for norm in (q_norm, k_norm):
        if norm is None:
            key.append(None)
            continue
        if type(norm) is not HeadNorm:
            return None
        key += (norm.kind, norm.eps)
        for vector in (norm.weight, norm.bias):
            key.append(None if vector is None else (vector.shape, vector.device))
    if plan is not None:
        if type(plan) is not PackPlan:
            return None
        key += (plan.cu_seqlens.shape == segments, plan.items.device, plan.cu_seqlens_k is None)
    return tuple(key)


def _check_arguments(
    tensors: tuple[Tensor, ...], cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q_norm: HeadNorm | None,
    k_norm: HeadNorm | None, plan: PackPlan | None, backend: str,
) -> None:  # fmt: skip
    q_THD, k_THD, v_THD = sides(*tensors)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "q", q_THD)
    if cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k_THD)
        check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens.shape, "(S + 1,)")
    check_head_norm("q_norm", q_norm, "q", q_THD)
    check_head_norm("k_norm", k_norm, "k", k_THD)
    if plan is not None:
        if not isinstance(plan, PackPlan):
            fail("plan", "a PackPlan", type(plan).__name__)
        check_shape("plan.cu_seqlens", plan.cu_seqlens, cu_seqlens.shape, "(S + 1,)")
        check_same("plan.items", plan.items, "q", q_THD, dtype=False)
        if (plan.cu_seqlens_k is None) != (cu_seqlens_k is None):
            fail("plan", "made with lengths_k exactly where cu_seqlens_k is given", plan.cu_seqlens_k)
        check_equal("plan.cu_seqlens", plan.cu_seqlens, "cu_seqlens", cu_seqlens)
        if plan.cu_seqlens_k is not None and cu_seqlens_k is not None:
            check_equal("plan.cu_seqlens_k", plan.cu_seqlens_k, "cu_seqlens_k", cu_seqlens_k)
    if takes_reference(backend, q_THD):
        return
    check_dtype("q", q_THD, DTYPES if backend in ("auto", "triton") else DTYPES[:2])
    if q_THD.shape[-1] not in SUPPORTED_HEAD_DIMS:
        fail("q", "of a head width D that is a multiple of 8 from 16 to 128", q_THD.shape[-1])
    for name, tensor in (("q", q_THD), ("k", k_THD), ("v", v_THD)):
        if tensor.stride(-1) != 1:
            fail(name, "contiguous over D", f"strides {tensor.stride()}")


def sides(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Sequence[Tensor]:
    """(q, k, v), be it from the packed (T, 3, H, D)."""
    return q.unbind(1) if k is None or v is None else (q, k, v)


def norm_fields(q_norm: HeadNorm | None, k_norm: HeadNorm | None) -> tuple[Any, ...]:
    """Those of launch.Norms: a bias of k changes no output."""
    q, k = q_norm or NO_NORM, k_norm or NO_NORM
    q_kind, k_kind = (NORM_CODES[None if norm is None else norm.kind] for norm in (q_norm, k_norm))
    return q_kind, q.weight, q.bias, q.eps, k_kind, k.weight, k.eps
