"""varlen_attention under the names of flash-attn and of torch: a change of the import and nothing else.

    from navit_kernels.flash_attn_interface import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
    from navit_kernels.flash_attn_interface import varlen_attn

Argument names, order, defaults and shapes are those of flash-attn 2 (2.8) and of
`torch.nn.attention.varlen` (torch 2.13). An argument that the kernels cannot honour raises NotImplementedError when it
is given another value than its default. What holds for varlen_attention holds here: CPU tensors run the reference,
float32 works, and of head widths the multiples of 8 from 16 to 128.

T tokens, H heads, D head width, S segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_shape, fail
from .head_norm import HeadNorm
from .plan import PackPlan
from .self_attention import varlen_attention, varlen_attention_qkvpacked

__all__ = ["flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "varlen_attn"]

Window = tuple[int, int]
DEFAULTS = {  # of the arguments that have no other value here
    "dropout_p": 0.0,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "block_table": None,
    "seqused_q": None,
    "seqused_k": None,
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "attention_chunk": 0,
    "num_splits": 1,
    "pack_gqa": None,
    "sm_margin": 0,
}


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    plan: PackPlan | None = None,
) -> Any:
    """flash-attn's function on packed segments.

    q: (T, H, D); k, v: (T of the keys, H, D). cu_seqlens_q, cu_seqlens_k: (S + 1,) int32.
    max_seqlen_q, max_seqlen_k: the kernels need neither. On CPU tensors they are checked, on a GPU that would wait.
    softmax_scale: D ** -0.5 by default. deterministic: either way, the backward is bitwise repeatable.
    return_attn_probs: also return the log-sum-exp, float32 (H, T), −inf where a query has no keys, and an empty tensor:
        flash-attn fills the third place only when it drops out.
    seqused_q … sm_margin: FlashAttention-3's names; by keyword only, for it has another order.
    q_norm, k_norm, plan: as in varlen_attention; flash-attn has none of them.

    Returns out (T, H, D), or (out, lse, empty). Raises NotImplementedError naming the argument for any other value than
    the default of dropout_p, causal, window_size, softcap, alibi_slopes, block_table and FlashAttention-3's names, and
    for k and v of fewer heads than q.
    """
    _refuse(
        dropout_p=dropout_p, causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        block_table=block_table, seqused_q=seqused_q, seqused_k=seqused_k, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk, num_splits=num_splits,
        pack_gqa=pack_gqa, sm_margin=sm_margin,
    )  # fmt: skip
    _refuse_groups("k", q, k)
    _check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    _check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    result = varlen_attention(
        q, k, v, cu_seqlens_q, _keys(cu_seqlens_q, cu_seqlens_k), q_norm=q_norm, k_norm=k_norm,
        softmax_scale=softmax_scale, plan=plan, return_lse=return_attn_probs,
    )  # fmt: skip
    return (*result, q.new_empty(0)) if return_attn_probs else result


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    plan: PackPlan | None = None,
) -> Any:
    """flash_attn_varlen_func of q, k, v = qkv.unbind(1), qkv (T, 3, H, D), whose gradient is written in one piece."""
    check_shape("qkv", qkv, (None, 3, None, None), "(T, 3, H, D)")
    _refuse(dropout_p=dropout_p, causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes)
    _check_longest("max_seqlen", max_seqlen, cu_seqlens)
    shared: dict[str, Any] = dict(q_norm=q_norm, k_norm=k_norm, softmax_scale=softmax_scale, plan=plan)
    if return_attn_probs:
        q, k, v = qkv.unbind(1)
        return *varlen_attention(q, k, v, cu_seqlens, return_lse=True, **shared), qkv.new_empty(0)
    return varlen_attention_qkvpacked(qkv, cu_seqlens, **shared)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    plan: PackPlan | None = None,
) -> Any:
    """torch.nn.attention.varlen.varlen_attn: flash_attn_varlen_func under torch's names.

    return_aux: with .lse true, the log-sum-exp, float32 (H, T), is returned as well.
    enable_gqa: allowed, but k and v must have q's heads all the same. num_splits: None or 1, which is what happens.

    Returns out (T, H, D), or (out, lse). Raises NotImplementedError naming the argument for window_size, seqused_k,
    block_table and num_splits, for a cu_seq_k of None, and for fewer heads in key than in query.
    """
    _refuse(
        window_size=window_size, seqused_k=seqused_k, block_table=block_table,
        num_splits=1 if num_splits is None else num_splits,
    )  # fmt: skip
    if cu_seq_k is None:
        raise NotImplementedError("cu_seq_k must be given: torch leaves it out for paged keys, which are not supported")
    _refuse_groups("key", query, key)
    _check_longest("max_q", max_q, cu_seq_q)
    _check_longest("max_k", max_k, cu_seq_k)
    return varlen_attention(
        query, key, value, cu_seq_q, _keys(cu_seq_q, cu_seq_k), q_norm=q_norm, k_norm=k_norm, softmax_scale=scale,
        plan=plan, return_lse=return_aux is not None and return_aux.lse,
    )  # fmt: skip


def _keys(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor | None:
    """The same tensor twice is self-attention; whether two tensors hold the same lengths is not looked into."""
    return None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        got = "a tensor" if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value
        if got != DEFAULTS[name]:
            raise NotImplementedError(f"{name} must be {DEFAULTS[name]}, got {got}: nothing else is supported")


def _refuse_groups(name: str, q: Tensor, k: Tensor) -> None:
    if q.dim() == k.dim() == 3 and q.shape[1] != k.shape[1]:
        expected = f"of the query's {q.shape[1]} heads"
        raise NotImplementedError(f"{name} must be {expected}, got {k.shape[1]}: grouped queries are not supported")


def _check_longest(name: str, longest: Any, cu_seqlens: Tensor) -> None:
    """Only where reading the lengths costs no wait."""
    on_host = isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu" and isinstance(longest, int)
    if on_host and not torch.compiler.is_compiling() and cu_seqlens.shape[0] > 1:
        needed = int(cu_seqlens.diff().max())
        if longest < needed:
            fail(name, f"at least the tokens of the longest segment, {needed}", longest)
