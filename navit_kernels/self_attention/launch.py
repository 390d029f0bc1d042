"""Launchers: from tensors to kernels. T tokens, H heads, D head width, S segments."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._jit import BoundKernel, architecture, gluon_is_supported, launch_kernel
from ..head_norm import NORM_CODES
from ..plan import CLASS_LIMITS, CLASSES, ITEM_FIELDS, TILE, check_plan_tokens, max_items
from . import kernel, kernel_backward
from .config import ClassConfig, Launch, rows_of_class
from .signature import Signature, strided

LONGEST_FIRST = range(CLASSES - 1, -1, -1)
PREPARE = {16: (32, 4), 32: (16, 8)}  # rows and warps of backward_prepare by bits; float32 multiplies there, too


class Norms(NamedTuple):
    """The norms of a call, taken apart: tensors may be None, kinds are NORM_CODES."""

    q_kind: int
    q_weight: Tensor | None
    q_bias: Tensor | None
    q_eps: float
    k_kind: int
    k_weight: Tensor | None
    k_eps: float


def tma_reaches(*tensors: Tensor) -> bool:
    """Whether addresses and strides of (T, H, D) tensors are multiples of 16 bytes, as TMA wants them."""
    size = tensors[0].element_size()
    for tensor in tensors:
        token, head, _ = tensor.stride()
        if tensor.data_ptr() % 16 or token <= 0 or head <= 0 or token * size % 16 or head * size % 16:
            return False
    return True


def plan_on_device(cu_seqlens: Tensor, cu_seqlens_k: Tensor, tokens: int, tokens_k: int) -> tuple[Tensor, Tensor]:
    """(items, offsets) as in PackPlan from cu_seqlens alone, without a wait for the device.

    Starts and ends outside the tensors are clamped to them: wrong cu_seqlens give wrong numbers, never a wrong address.
    """
    segments = cu_seqlens.shape[0] - 1
    sides = tokens if cu_seqlens_k is cu_seqlens else tokens + tokens_k
    items = torch.empty(max_items(sides, segments), ITEM_FIELDS, dtype=torch.int32, device=cu_seqlens.device)
    offsets = torch.empty(CLASSES + 1, dtype=torch.int32, device=cu_seqlens.device)
    launch_kernel(
        kernel.write_plan, (CLASSES,),
        cu_seqlens_ptr=cu_seqlens, cu_seqlens_k_ptr=cu_seqlens_k, items_ptr=items, offsets_ptr=offsets,
        segments=segments, tokens=tokens, tokens_k=tokens_k, capacity=items.shape[0],
        LIMITS=CLASS_LIMITS, CLASSES=CLASSES, TILE=TILE, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return items, offsets


@functools.cache
def compile_options(launch: Launch) -> dict:
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    return options if launch.registers is None else options | dict(maxnreg=launch.registers)


known_signature = functools.lru_cache(256)(Signature)


def signature_of(q: Tensor, k: Tensor, v: Tensor, norms: Norms, softmax_scale: float) -> Signature:
    heads, width = q.shape[1:]
    weights = (norms.q_weight, norms.q_bias, norms.k_weight)
    q_weight, q_bias, k_weight = (0 if weight is None else weight.dim() for weight in weights)
    return known_signature(
        architecture(q.device), q.dtype, heads, width, q.stride(), k.stride(), v.stride(),
        norms.q_kind, q_weight, q_bias, norms.q_eps, norms.k_kind, k_weight, norms.k_eps, softmax_scale,
    )  # fmt: skip


class Launcher:
    """One call's tensors and work, and its Signature, whose attributes are this one's, too."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, norms: Norms, softmax_scale: float, items: Tensor, offsets: Tensor,
        host_offsets: Tensor | tuple[int, ...] | None, cross: bool = False, signature: Signature | None = None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.norms = q, k, v, norms
        self.signature = signature or signature_of(q, k, v, norms, softmax_scale)
        self.items, self.offsets = items, offsets
        self.tokens = q.shape[0] + (k.shape[0] if cross else 0)  # at least the sum of each segment's longer side
        self.ends = host_offsets.tolist() if isinstance(host_offsets, Tensor) else host_offsets
        if self.ends is not None:
            check_plan_tokens(self.ends, q.shape[0], k.shape[0])
        # those that may hold work, the longest segments first
        self.classes = [c for c in LONGEST_FIRST if self.items_of(c) > 0]
        _, q_weight, q_bias, _, _, k_weight, _ = norms
        self.weight_pointers = dict(
            q_weight_ptr=offsets if q_weight is None else q_weight, q_bias_ptr=offsets if q_bias is None else q_bias,
            k_weight_ptr=offsets if k_weight is None else k_weight,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.signature, name)

    def gluon(self, *tensors: Tensor) -> bool:
        """Whether Hopper's own kernels may run, which reach all tensors by TMA."""
        if self.q.device.type == "cpu" or not gluon_is_supported():
            return False
        if tma_reaches(*tensors):
            return True
        warnings.warn("tensors without 16-byte alignment: varlen_attention's slower portable kernels run", stacklevel=2)
        return False

    def grid(self, index: int, splits: int = 1) -> tuple[int]:
        return (self.items_of(index) * self.signature.heads * splits,)

    def items_of(self, index: int) -> int:
        """A class's items; on the device, where their count is, the most that there can be."""
        return self.most_items(index) if self.ends is None else self.ends[index + 1] - self.ends[index]

    def most_items(self, index: int) -> int:
        """A bound on a class's items from shapes alone; the programs beyond its true count end at once."""
        shortest = CLASS_LIMITS[index - 1] + 1 if index else 1
        segments = self.tokens // shortest
        if index == CLASSES - 1:
            segments += self.tokens // TILE
        return min(segments, self.items.shape[0])

    def work(self, index: int) -> dict:
        """The arguments that say which items a launch works on, beside CLASS; see items_of_class in kernel.py."""
        return dict(
            items_ptr=self.items, offsets_ptr=self.offsets, first_item=-1 if self.ends is None else self.ends[index],
            items=self.items_of(index), tokens=self.q.shape[0], tokens_k=self.k.shape[0],
        )  # fmt: skip

    def rows(self, **tensors: Tensor) -> dict:
        """Pointer and strides of (T, H, D) tensors: q=q gives q_ptr, q_stride_t and q_stride_h; see `strided`."""
        pointers = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
        return pointers | strided(**{name: tensor.stride() for name, tensor in tensors.items()})

    def outputs(self, **tensors: Tensor) -> dict:
        """Pointer and token stride of (T, H, D) tensors whose heads lie side by side."""
        args: dict = {}
        for name, tensor in tensors.items():
            args[f"{name}_ptr"], args[f"{name}_stride_t"] = tensor, tensor.stride(0)
        return args

    def weights(self) -> dict:
        return self.weight_pointers | self.signature.weights


@functools.lru_cache(1024)
def bound_forward(signature: Signature, index: int, gluon: bool, save_lse: bool) -> BoundKernel:
    """The portable forward of a class."""
    config, rows = signature.config(index, gluon), rows_of_class(index)
    launch = config.forward
    common = dict(
        **signature.strides, **signature.weights, **signature.shape, **signature.norm_numbers, **signature.scores,
        CLASS=index, SAVE_LSE=save_lse, PRECISION=signature.precision, **compile_options(launch),
    )  # fmt: skip
    if launch.kernel == "tile":
        return BoundKernel(kernel.forward_tile, BLOCK=launch.block_m, **common)
    return BoundKernel(
        kernel.forward_stream, **common, ROWS=rows, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        NORMALIZE_KEYS=config.normalize_keys and signature.norm_numbers["K_NORM"] != 0,
        TRY_FIXED_MAX=config.fixed_max and signature.bounds_scores,
    )  # fmt: skip


def forward(call: Launcher, save_lse: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out_THD, lse_HT in units of log2 and without βk's share, r_HT2); lse and r are None where not needed."""
    q, k, v, signature = call.q, call.k, call.v, call.signature
    tokens, tokens_k = q.shape[0], k.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((signature.heads, tokens), dtype=torch.float32) if save_lse else None
    r = None
    if tokens == 0:
        return out, lse, r
    lse_or_any = call.offsets if lse is None else lse
    tensors = dict(q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse_or_any, **call.weight_pointers)
    gluon = tokens_k > 0 and not signature.hopper_forward.isdisjoint(call.classes) and call.gluon(q, k, v, out)
    for index in call.classes:
        config = signature.forward_configs[gluon][index]
        launch = config.forward
        if launch.kernel == "hopper_tile":
            from . import hopper_forward_tile

            hopper_forward_tile.forward_tile(
                call, index, out, lse_or_any, save_lse, block=launch.block_m, chunk=launch.block_n, warps=launch.warps,
                fixed_max=config.fixed_max, registers=launch.registers,
            )  # fmt: skip
            continue
        if launch.kernel == "tile":
            bound_forward(signature, index, gluon, save_lse)(call.grid(index), **tensors, **call.work(index))
            continue
        r_tiles = None
        if launch.kernel == "hopper_stream":
            from . import hopper_forward

            r_tiles = hopper_forward.key_size_tiles(call, index)
        takes_r = call.norms.k_kind != 0 and signature.bits != 32 and not config.normalize_keys
        if takes_r:
            if r is None:
                r = q.new_empty((signature.heads, tokens_k, 2), dtype=torch.float32)
            key_sizes(call, index, r, r_tiles)
        if r_tiles is not None:
            fixed_max = config.fixed_max and signature.wide_range
            hopper_forward.forward_stream(call, index, launch, out, lse_or_any, r_tiles, save_lse, fixed_max)
            continue
        bound_forward(signature, index, gluon, save_lse)(
            call.grid(index, rows_of_class(index) // launch.block_m),
            **tensors,
            **call.work(index),
            r_ptr=r if takes_r else lse_or_any,
        )
    return out, lse, r


def programs_per_item(index: int, config: ClassConfig) -> int:
    """Programs that own queries of one item and head: each writes a row of partials."""
    return max(1, rows_of_class(index) // (config.queries or config.backward).block_m)


@functools.lru_cache(1024)
def bound_key_sizes(signature: Signature, index: int, tiles: bool) -> BoundKernel:
    norms = signature.norm_numbers
    names = ("UNIT", "k_stride_t", "k_stride_h")
    return BoundKernel(
        kernel.key_sizes, **{name: signature.strides[name] for name in names}, **signature.shape,
        k_eps=norms["k_eps"], K_NORM=norms["K_NORM"], CLASS=index, ROWS=rows_of_class(index),
        TILES=tiles, num_warps=4,
    )  # fmt: skip


def key_sizes(call: Launcher, index: int, r: Tensor, r_tiles: Tensor | None = None) -> None:
    bound_key_sizes(call.signature, index, r_tiles is not None)(
        call.grid(index), k_ptr=call.k, **call.work(index), r_ptr=r, r_tiles_ptr=r if r_tiles is None else r_tiles,
        slots=0 if r_tiles is None else r_tiles.shape[1],
    )  # fmt: skip


def backward(
    call: Launcher, dout: Tensor, out: Tensor, lse: Tensor, r: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    weight_grads: bool,
) -> Tensor | None:  # fmt: skip
    """Write dq, dk, dv; return the gradients of γq, βq, γk as float32 (H, 3, D), or None."""
    q, k, v, norms = call.q, call.k, call.v, call.norms
    tokens, tokens_k = q.shape[0], k.shape[0]
    if tokens == 0 or tokens_k == 0:
        for grad in (dq, dk, dv):
            grad.zero_()
        return q.new_zeros(call.heads, 3, call.width, dtype=torch.float32) if weight_grads else None
    gluon = not call.signature.hopper.isdisjoint(call.classes) and call.gluon(q, k, v, out)
    gluon_backward = gluon and call.gluon(dout, dq, dk, dv)
    configs = {index: call.config(index, gluon, gluon_backward) for index in call.classes}
    splits = max((programs_per_item(i, c) for i, c in configs.items()), default=1)
    partials = lse
    if weight_grads:
        # with splits, items of other classes leave gaps
        make = torch.empty if splits == 1 else torch.zeros
        shape = (call.items.shape[0] * splits, call.heads, call.width * (1 + call.shift))
        partials = make(shape, dtype=torch.float32, device=q.device)
    grads = dict(partials_ptr=partials, WEIGHT_GRADS=weight_grads, splits=splits, softmax_scale=call.softmax_scale)
    score = dict(score_scale=call.score_scale, PRECISION=call.precision)
    inputs = call.rows(q=q, k=k, v=v, dout=dout)
    row_pairs = None
    for index, config in configs.items():
        launch = config.backward
        if launch.kernel == "hopper_tile":
            from . import hopper_backward_tile

            hopper_backward_tile.backward_tile(
                call, index, dout, lse, dq, dk, dv, partials, splits, weight_grads, block=launch.block_m,
                warps=launch.warps, registers=launch.registers,
                use_lse=config.forward.kernel != "stream",  # whose scores are these, to the bit; a stream's K is raw
            )  # fmt: skip
            continue
        if launch.kernel == "hopper_resident":
            from . import hopper_backward_resident

            hopper_backward_resident.backward_resident(
                call, index, dout, out, lse, dq, dk, dv, partials, splits, weight_grads, block=launch.block_m,
                use_lse=config.forward.kernel != "stream" or config.normalize_keys, registers=launch.registers,
            )  # fmt: skip
            continue
        work = dict(**call.work(index), CLASS=index)
        base = dict(**call.shape, **work, **compile_options(launch))
        if launch.kernel in ("tile", "resident"):
            common = dict(
                **base, **inputs, **call.outputs(dq=dq, dk=dk, dv=dv), **call.weights(), **grads, **call.norm_numbers,
                **score, fold_scale=call.fold_scale, key_factor=call.key_factor,
            )  # fmt: skip
            if launch.kernel == "tile":
                launch_kernel(kernel_backward.backward_tile, call.grid(index), **common, BLOCK=launch.block_m)
            else:
                launch_kernel(
                    kernel_backward.backward_resident,
                    call.grid(index),
                    **common,
                    out_ptr=out,
                    lse_ptr=lse,
                    BLOCK_M=launch.block_m,
                    BLOCK_N=launch.block_n,
                )
            continue
        rows, queries = rows_of_class(index), config.queries
        normalize_keys = config.normalize_keys and norms.k_kind != 0
        r_or_any = lse if r is None or r.numel() == 0 else r
        if norms.k_kind != 0 and not (normalize_keys or gluon) and call.forward_configs[True][index].normalize_keys:
            # the forward may have reached by TMA what a hook on saved tensors has moved since: that kernel leaves no r
            r_or_any = q.new_empty((call.heads, tokens_k, 2), dtype=torch.float32)
            key_sizes(call, index, r_or_any)
        hopper = launch.kernel == "hopper_stream"
        if hopper:
            padded = torch.empty(3, call.items_of(index), call.heads, rows, dtype=torch.float32, device=q.device)
            row_numbers, sizes = padded[:2], padded[2]
        else:
            if row_pairs is None:
                planes = 2 if call.bits == 32 else 1
                row_pairs = torch.empty(planes, *lse.shape, 2, dtype=torch.float32, device=q.device)
            row_numbers = sizes = row_pairs
        block, warps = PREPARE[call.bits]
        launch_kernel(
            kernel_backward.backward_prepare, call.grid(index, rows // block),
            **call.shape, **work, **inputs, **call.outputs(dq=dq), **call.weights(), **call.norm_numbers,
            **score, out_ptr=out, lse_ptr=lse, r_ptr=r_or_any, rows_ptr=row_numbers, sizes_ptr=sizes,
            fold_scale=call.fold_scale, CENTRE=norms.k_kind == NORM_CODES["layer_norm"] and not normalize_keys,
            ROWS=rows, BLOCK=block, PADDED=launch.block_m if hopper else 0, num_warps=warps,
        )  # fmt: skip
        if hopper:
            from . import hopper_backward

            hopper_backward.backward_stream(
                call, index, dout, dq, dk, dv, row_numbers, sizes, partials, splits, weight_grads,
                stages=(launch.stages, queries.stages),
            )  # fmt: skip
            continue
        launch_kernel(
            kernel_backward.backward_keys, call.grid(index, rows // launch.block_n),
            **base, **call.rows(k=k, v=v, dout=dout), **call.outputs(dk=dk, dv=dv), **score,
            key_factor=call.key_factor, u_ptr=dq, u_stride_t=dq.stride(0),
            rows_ptr=row_pairs, r_ptr=r_or_any,
            k_eps=norms.k_eps, K_NORM=norms.k_kind, FOLD=call.fold, ROWS=rows, BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n, NORMALIZE_KEYS=normalize_keys,
        )  # fmt: skip
        base.update(compile_options(queries))
        launch_kernel(
            kernel_backward.backward_queries, call.grid(index, rows // queries.block_m),
            **base, **inputs, **call.outputs(dq=dq), **call.weights(), **grads, **call.norm_numbers, **score,
            rows_ptr=row_pairs, r_ptr=r_or_any, ROWS=rows,
            BLOCK_M=queries.block_m, BLOCK_N=queries.block_n, NORMALIZE_KEYS=normalize_keys,
        )  # fmt: skip
    return weight_gradients(norms, sum_partials(call, partials, splits), call.width) if weight_grads else None


def weight_gradients(norms: Norms, sums_HW: Tensor, width: int) -> Tensor:
    """(H, 3, D) of γq, βq, γk from A and, where there is a βq, B; see kernel_backward.py."""
    a_HD, b_HD = sums_HW[:, :width], sums_HW[:, width:]
    q_weight, q_bias, k_weight = (
        1.0 if weight is None else weight.float() for weight in (norms.q_weight, norms.q_bias, norms.k_weight)
    )
    grads_H3D = a_HD.new_empty(a_HD.shape[0], 3, width)
    dq_weight_HD, dq_bias_HD, dk_weight_HD = grads_H3D.unbind(1)
    torch.mul(a_HD, k_weight, out=dq_weight_HD)
    torch.mul(a_HD, q_weight, out=dk_weight_HD)
    if norms.q_bias is None:
        dq_bias_HD.zero_()
    else:
        torch.mul(b_HD, k_weight, out=dq_bias_HD)
        dk_weight_HD += b_HD * q_bias
    return grads_H3D


def sum_partials(call: Launcher, partials: Tensor, splits: int) -> Tensor:
    rows, heads, width = partials.shape
    chunk = 64
    sums = torch.empty(triton.cdiv(rows, chunk), heads, width, dtype=torch.float32, device=partials.device)
    launch_kernel(
        kernel_backward.sum_partials, (sums.shape[0], heads),
        partials_ptr=partials, sums_ptr=sums, offsets_ptr=call.offsets, H=heads, WIDTH=width, splits=splits,
        CLASSES=CLASSES, CHUNK=chunk, BLOCK=16, BLOCK_W=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return sums.sum(0)
