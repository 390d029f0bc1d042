"""Attention pooling: every segment asks the same few queries of its own tokens, forward and backward.

The norms are folded as in self-attention. With γk the weight of k_norm, C the centring (the identity but for
"layer_norm") and r_j the key's own scale, r = rsqrt(mean((Ck)²) + eps), or √D / max(‖k‖, eps) for "l2":

    u_i  = scale · C(γk ⊙ norm(query_i))           the folded query: one for all images, made by op.fold_query
    S_ij = r_j · u_i·Ck_j  (+ a constant of i, which the softmax does not see)
    P = softmax_j(S)                               out_i = Σ_j P_ij v_j

Forward: one program per (slot, head) streams the slot's tokens (see kernel_segments for slots). Each row of its tile
keeps an online softmax of its own, so that rows meet only once, at the end; a second kernel joins a segment's slots in
their order. Backward, with dS_ij = P_ij dout_i·(v_j − out_i), one program per (slot, head):

    dv_j = Σ_i P_ij dout_i        a_j = Σ_i dS_ij r_j u_i        du_i = Σ_j dS_ij r_j Ck_j   (per slot, then summed)
    dk_j = a_j − (r_j² / D)(a_j·Ck_j) Ck_j         second term absent without a norm or where "l2" clamps ‖k‖;
                                                   a_j needs no centring, because u_i is centred

Arithmetic is float32: k is centred in registers, and neither u nor the out of the backward is rounded, so that neither
a large mean of k nor a softmax with one dominant key, where v_j − out cancels, costs accuracy. For float32 inputs the
scores are float64: the rounding of a score of 100 would outweigh all else.

Dao: FlashAttention-2 (2023), arXiv 2307.08691; the pooling itself is MAP: Zhai et al. (2021), arXiv 2106.04560.
T tokens, S segments (images), Q queries, H heads, D head width, N slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._jit import launch_kernel
from .kernel_segments import segment_slots, slot_count, slot_tokens

CHUNK = 256  # tokens of a forward slot; a backward slot is one tile
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: LOWEST − LOWEST is no NaN


@triton.jit
def _load_heads(ptr, offs_t, offs_d, mask_t, head, STRIDE_T: tl.constexpr, STRIDE_H: tl.constexpr, D: tl.constexpr):
    offs = offs_t.to(tl.int64) * STRIDE_T + head.to(tl.int64) * STRIDE_H + offs_d
    return tl.load(ptr + offs, mask=mask_t & (offs_d < D), other=0.0).to(tl.float32)  # [1, BLOCK_T, BLOCK_D]


@triton.jit
def _load_queries(ptr, row, offs_q, head, offs_d, Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """Rows (row, offs_q, head) of a contiguous (rows, Q, H, D) tensor. The same for all BLOCK_T tokens: offs_q repeats,
    because a load of one row would spread it over all threads and drag the keys' layout after it."""
    offs = ((row.to(tl.int64) * Q + offs_q) * H + head) * D + offs_d
    return tl.load(ptr + offs, mask=(offs_q < Q) & (offs_d < D), other=0.0).to(
        tl.float32
    )  # [BLOCK_Q, BLOCK_T, BLOCK_D]


@triton.jit
def _normed_keys(k, offs_d, eps, NORM: tl.constexpr, D: tl.constexpr):
    """(Ck [1, BLOCK_T, BLOCK_D], r [1, BLOCK_T], r² / D or 0 where r does not depend on k)."""
    if NORM == "layer_norm":
        k = tl.where(offs_d < D, k - (tl.sum(k, 2) / D)[:, :, None], 0.0)
    square = tl.sum(k * k, 2)
    if NORM == "l2":
        r = tl.sqrt(D * 1.0) / tl.maximum(tl.sqrt(square), eps)
        slope = tl.where(tl.sqrt(square) > eps, r * r / D, 0.0)
    elif NORM == "none":
        r = tl.full(square.shape, 1.0, square.dtype)
        slope = tl.zeros_like(square)
    else:
        r = tl.rsqrt(square / D + eps)
        slope = r * r / D
    return k, r, slope


@triton.jit(do_not_specialize=["segments"])
def pool_partial_kernel(
    u_ptr, k_ptr, v_ptr, cu_seqlens_ptr, acc_ptr, max_ptr, sum_ptr,
    segments, eps,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of BLOCK_Q queries over one slot: acc = Σ exp(S − max) v, sum = Σ exp(S − max)."""
    GROUPS: tl.constexpr = (Q + BLOCK_Q - 1) // BLOCK_Q
    slot = tl.program_id(0) // (H * GROUPS)
    head = tl.program_id(0) // GROUPS % H
    offs_q = tl.program_id(0) % GROUPS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    repeat = tl.zeros([1, BLOCK_T, 1], tl.int32)
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    segment, first, last = slot_tokens(slot, cu_seqlens_ptr, segments, CHUNK)
    if first >= last:
        return

    WIDE: tl.constexpr = tl.float64 if k_ptr.dtype.element_ty == tl.float32 else tl.float32
    u = _load_queries(u_ptr, head * 0, offs_q[:, None, None] + repeat, head, offs_d, Q, H, D).to(WIDE)
    row_max = tl.full([BLOCK_Q, BLOCK_T], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_Q, BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_T, BLOCK_D], tl.float32)
    for begin in range(first, last, BLOCK_T):
        offs_t = begin + tl.arange(0, BLOCK_T)
        mask_t = (offs_t < last)[None, :, None]
        k = _load_heads(k_ptr, offs_t[None, :, None], offs_d, mask_t, head, STRIDE_KT, STRIDE_KH, D)
        v = _load_heads(v_ptr, offs_t[None, :, None], offs_d, mask_t, head, STRIDE_VT, STRIDE_VH, D)
        k, r, slope = _normed_keys(k.to(WIDE), offs_d, eps, NORM, D)
        score = tl.sum(u * k, 2) * r  # [BLOCK_Q, BLOCK_T]
        score = tl.where((offs_t < last)[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, score.to(tl.float32))
        scale, p = tl.exp(row_max - new_max), tl.exp((score - new_max).to(tl.float32))
        row_max = new_max
        row_sum = row_sum * scale + p
        acc = acc * scale[:, :, None] + p[:, :, None] * v

    top = tl.max(row_max, 1)  # [BLOCK_Q]
    scale = tl.exp(row_max - top[:, None])
    total = tl.sum(row_sum * scale, 1)
    acc = tl.sum(acc * scale[:, :, None], 1)  # [BLOCK_Q, BLOCK_D]

    offs_d = tl.arange(0, BLOCK_D)
    rows = (slot.to(tl.int64) * Q + offs_q) * H + head
    tl.store(max_ptr + rows, top, mask=offs_q < Q)
    tl.store(sum_ptr + rows, total, mask=offs_q < Q)
    tl.store(acc_ptr + rows[:, None] * D + offs_d[None, :], acc, mask=(offs_q < Q)[:, None] & (offs_d < D)[None, :])


@triton.jit
def pool_combine_kernel(
    acc_ptr, max_ptr, sum_ptr, cu_seqlens_ptr, out_ptr, out32_ptr, top_ptr, total_ptr,
    QH: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R (query, head) rows of one segment from its slots, in their order."""
    GROUPS: tl.constexpr = (QH + BLOCK_R - 1) // BLOCK_R
    segment = (tl.program_id(0) // GROUPS).to(tl.int64)
    offs_r = tl.program_id(0) % GROUPS * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < QH
    mask = mask_r[:, None] & (offs_d < D)[None, :]
    start, length, slot, slots = segment_slots(segment, cu_seqlens_ptr, CHUNK)

    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for index in range(slots):
        rows = (slot + index) * QH + offs_r
        slot_max = tl.load(max_ptr + rows, mask=mask_r, other=0.0)
        new_top = tl.maximum(top, slot_max)
        scale, slot_scale = tl.exp(top - new_top), tl.exp(slot_max - new_top)
        top = new_top
        total = total * scale + tl.load(sum_ptr + rows, mask=mask_r, other=0.0) * slot_scale
        slot_acc = tl.load(acc_ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        acc = acc * scale[:, None] + slot_acc * slot_scale[:, None]
    if slots > 0:
        acc /= total[:, None]

    rows = segment * QH + offs_r
    tl.store(top_ptr + rows, top, mask=mask_r)
    tl.store(total_ptr + rows, total, mask=mask_r)
    tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out32_ptr + rows[:, None] * D + offs_d[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["segments"])
def pool_backward_kernel(
    dout_ptr, out32_ptr, top_ptr, total_ptr, u_ptr, k_ptr, v_ptr, cu_seqlens_ptr, du_ptr, dk_ptr, dv_ptr,
    segments, eps,
    STRIDE_KT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_VH: tl.constexpr,
    Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one slot of BLOCK_T tokens and one head, and the slot's share of du."""
    slot = tl.program_id(0) // H
    head = tl.program_id(0) % H
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    segment, first, last = slot_tokens(slot, cu_seqlens_ptr, segments, BLOCK_T)
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < last
    offs_t = offs_t[None, :, None]
    k = _load_heads(k_ptr, offs_t, offs_d, mask_t[None, :, None], head, STRIDE_KT, STRIDE_KH, D)
    v = _load_heads(v_ptr, offs_t, offs_d, mask_t[None, :, None], head, STRIDE_VT, STRIDE_VH, D)
    WIDE: tl.constexpr = tl.float64 if k_ptr.dtype.element_ty == tl.float32 else tl.float32
    wide_k, wide_r, slope = _normed_keys(k.to(WIDE), offs_d, eps, NORM, D)
    k, r, slope = wide_k.to(tl.float32), wide_r.to(tl.float32), slope.to(tl.float32)

    a = tl.zeros([1, BLOCK_T, BLOCK_D], tl.float32)
    dv = tl.zeros([1, BLOCK_T, BLOCK_D], tl.float32)
    for begin in range(0, Q, BLOCK_Q):
        offs_q = begin + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < Q
        offs_repeat = offs_q[:, None, None] + tl.zeros([1, BLOCK_T, 1], tl.int32)
        u = _load_queries(u_ptr, head * 0, offs_repeat, head, offs_d, Q, H, D)
        dout = _load_queries(dout_ptr, segment, offs_repeat, head, offs_d, Q, H, D)
        out = _load_queries(out32_ptr, segment, offs_repeat, head, offs_d, Q, H, D)
        rows = (segment.to(tl.int64) * Q + offs_q) * H + head
        top = tl.load(top_ptr + rows, mask=mask_q, other=0.0)  # [BLOCK_Q]
        total = tl.load(total_ptr + rows, mask=mask_q, other=1.0)

        mask = mask_q[:, None] & mask_t[None, :]
        score = tl.sum(u.to(WIDE) * wide_k, 2) * wide_r
        p = tl.exp((score - top[:, None]).to(tl.float32)) / total[:, None]
        p = tl.where(mask, p, 0.0)  # [BLOCK_Q, BLOCK_T]
        g = tl.where(mask, p * tl.sum(dout * (v - out), 2) * r, 0.0)
        dv += tl.sum(p[:, :, None] * dout, 0)[None, :, :]
        a += tl.sum(g[:, :, None] * u, 0)[None, :, :]
        du = tl.sum(g[:, :, None] * k, 1)  # [BLOCK_Q, BLOCK_D]
        offs = ((slot.to(tl.int64) * Q + offs_q) * H + head)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(du_ptr + offs, du, mask=mask_q[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :])

    dk = a - (slope * tl.sum(a * k, 2))[:, :, None] * k
    offs = (offs_t.to(tl.int64) * H + head) * D + offs_d
    mask = mask_t[None, :, None] & (offs_d < D)
    tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def choose_config(queries: int, width: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Launch choice by number of queries and head width. At most four queries at a time.

    H100, bfloat16, 65,536 tokens, µs for pt 12 × 64, ft 16 × 64, ft 16 × 72: forward, tiles of 1024 elements to four
    warps, 90, 108, 156 (of 2048: 91, 108, 168); backward, of 1024 to two warps, 169, 209, 423 (of 4096 to four: 190,
    207, 519). Four queries, ft 12 × 64: forward as for one, 149 (of 4096: 162); backward, of 4096 to two warps, 546 (of
    1024: 646, to four: 1325).
    """
    block_q = min(triton.next_power_of_2(queries), 4)
    block_d = max(triton.next_power_of_2(width), 16)
    if dtype == torch.float32:
        tile = 2048 if backward else 1024  # not tuned
    else:
        tile = 4096 if backward and queries > 1 else 1024
    block_t = max(tile // (block_q * block_d), 8)
    return {"BLOCK_Q": block_q, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 2 if backward else 4}


def _token_major(x_THD: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous and its head stride does not change with the batch; or a copy."""
    return x_THD if x_THD.stride(2) == 1 and x_THD.stride(0) >= x_THD.stride(1) else x_THD.contiguous()


def _strides(k_THD: Tensor, v_THD: Tensor) -> dict[str, int]:
    """Compile-time constants, so that loads of 72 channels are as wide as those of 64."""
    (kt, kh, _), (vt, vh, _) = k_THD.stride(), v_THD.stride()
    return {"STRIDE_KT": kt, "STRIDE_KH": kh, "STRIDE_VT": vt, "STRIDE_VH": vh}


def attention_pool(
    u_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (S, Q, H, D) in v's dtype, the same in float32, and (2, S, Q, H): max S and Σ exp(S − max S)."""
    (queries, heads, width), segments = u_QHD.shape, len(cu_seqlens) - 1
    out_SQHD = v_THD.new_empty(segments, queries, heads, width)
    out32_SQHD = torch.empty_like(out_SQHD, dtype=torch.float32)
    softmax_2SQH = v_THD.new_empty(2, segments, queries, heads, dtype=torch.float32)
    if out_SQHD.numel() == 0:
        return out_SQHD, out32_SQHD, softmax_2SQH
    k_THD, v_THD = _token_major(k_THD), _token_major(v_THD)
    config = choose_config(queries, width, k_THD.dtype, backward=False)
    slots = slot_count(len(k_THD), segments, CHUNK)
    acc_NQHD = u_QHD.new_empty(slots, queries, heads, width)
    max_NQH, sum_NQH = u_QHD.new_empty(2, slots, queries, heads)
    launch_kernel(
        pool_partial_kernel, (slots * heads * triton.cdiv(queries, config["BLOCK_Q"]),),
        u_QHD.contiguous(), k_THD, v_THD, cu_seqlens, acc_NQHD, max_NQH, sum_NQH,
        segments, eps, **_strides(k_THD, v_THD),
        Q=queries, H=heads, D=width, NORM=norm, CHUNK=CHUNK, **config,
    )  # fmt: skip
    block_r = min(triton.next_power_of_2(queries * heads), 16)
    launch_kernel(
        pool_combine_kernel, (segments * triton.cdiv(queries * heads, block_r),),
        acc_NQHD, max_NQH, sum_NQH, cu_seqlens, out_SQHD, out32_SQHD, *softmax_2SQH,
        QH=queries * heads, D=width, CHUNK=CHUNK, BLOCK_R=block_r, BLOCK_D=config["BLOCK_D"], num_warps=4,
    )  # fmt: skip
    return out_SQHD, out32_SQHD, softmax_2SQH


def attention_pool_backward(
    dout_SQHD: Tensor,
    out32_SQHD: Tensor,
    softmax_2SQH: Tensor,
    u_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens: Tensor,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return du in float32, dk and dv in k's dtype."""
    (queries, heads, width), segments = u_QHD.shape, len(cu_seqlens) - 1
    dk_THD, dv_THD = k_THD.new_empty(k_THD.shape), v_THD.new_empty(v_THD.shape)
    config = choose_config(queries, width, k_THD.dtype, backward=True)
    slots = slot_count(len(k_THD), segments, config["BLOCK_T"]) if segments else 0
    du_NQHD = u_QHD.new_empty(slots, queries, heads, width)
    if du_NQHD.numel():
        k_THD, v_THD = _token_major(k_THD), _token_major(v_THD)
        launch_kernel(
            pool_backward_kernel, (slots * heads,),
            dout_SQHD.contiguous(), out32_SQHD, *softmax_2SQH, u_QHD.contiguous(), k_THD, v_THD, cu_seqlens,
            du_NQHD, dk_THD, dv_THD,
            segments, eps, **_strides(k_THD, v_THD),
            Q=queries, H=heads, D=width, NORM=norm, **config,
        )  # fmt: skip
    return du_NQHD.sum(0), dk_THD, dv_THD
