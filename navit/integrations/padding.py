"""From a padded batch to a pack and back.

S images, N slots of each in the padded batch, R prefix tokens of each image, T valid slots, E model width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from navit_kernels import PackPlan, plan_pack
from navit_kernels._direct import nobody_watches, skips_dispatcher
from navit_kernels.plan import CLASSES, ITEM_FIELDS, max_items

_HOST_OFFSETS = plan_pack([]).host_offsets


@dataclass(frozen=True)
class Unpadded:
    """Where the tokens of a padded batch stand in the pack made of it.

    slots_T: int64 (T,), flat indices into the (S, N) slots: those that are valid, image after image.
    slots: N. prefix: R.
    cu_seqlens: int32 (S + 1,) of the pack without the prefix tokens.
    plan: of the pack in which each image's R prefix tokens stand before its other tokens; plan.cu_seqlens bounds them.

    Example: valid ((1, 1, 0), (1, 0, 1)) and prefix 1 give slots_T (0, 1, 3, 5), cu_seqlens (0, 2, 4) and
    plan.cu_seqlens (0, 3, 6).
    """

    slots_T: Tensor
    slots: int
    prefix: int
    cu_seqlens: Tensor
    plan: PackPlan

    @property
    def images(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def image_T(self) -> Tensor:
        return self.slots_T // self.slots

    @property
    def prefix_places(self) -> Tensor:
        """(S · R,): rows of the pack that hold prefix tokens."""
        ranks_R = torch.arange(self.prefix, device=self.slots_T.device)
        return (self.plan.cu_seqlens[:-1, None] + ranks_R).flatten()

    @property
    def token_places(self) -> Tensor:
        """(T,): rows of the pack that hold the other tokens."""
        return torch.arange(self.slots_T.shape[0], device=self.slots_T.device) + self.prefix * (self.image_T + 1)

    def with_prefix(self, x_TE: Tensor, prefix_RE: Tensor) -> Tensor:
        """The whole pack: before each image's tokens, the same R ones. Of the wider dtype of the two."""
        dtype, rows = torch.promote_types(x_TE.dtype, prefix_RE.dtype), x_TE.shape[0] + self.images * self.prefix
        pack_TE = x_TE.new_empty(rows, x_TE.shape[1], dtype=dtype).index_copy_(0, self.token_places, x_TE.to(dtype))
        return pack_TE.index_copy_(0, self.prefix_places, prefix_RE.to(dtype).repeat(self.images, 1))

    def without_prefix(self, x_TE: Tensor) -> Tensor:
        """(T, E): the tokens that are not prefix tokens."""
        return x_TE.index_select(0, self.token_places) if self.prefix else x_TE

    def pad(self, x_TE: Tensor) -> Tensor:
        """Back to (S, R + N, E): prefix tokens first, zeros where a slot is not valid."""
        padded = x_TE.new_zeros(self.images * self.slots, x_TE.shape[1])
        padded = padded.index_copy_(0, self.slots_T, self.without_prefix(x_TE)).unflatten(0, (self.images, self.slots))
        if not self.prefix:
            return padded
        prefix = x_TE.index_select(0, self.prefix_places).unflatten(0, (self.images, self.prefix))
        return torch.cat([prefix, padded], 1)


def unpad(valid_SN: Tensor, device: torch.device, prefix: int = 0) -> Unpadded:
    """Find the tokens of a padded batch and plan the pack of them.

    valid_SN: bool (S, N), in any pattern. On a GPU, the lengths in it are waited for, and nothing else; on the CPU,
        nothing is, but for what `whole` says.
    device: where the pack's tokens are. prefix: tokens that will stand before each image's own.

    One opaque op, whose number of tokens torch.compile learns when it runs: a compiled graph ends at it, unless
    torch._dynamo.config.capture_dynamic_output_shape_ops is set.
    """
    if valid_SN.device.type == "cpu" and skips_dispatcher(valid_SN) and bool(valid_SN.all()):
        images, slots = valid_SN.shape
        return whole(images, slots, device, prefix)
    return _unpadded(valid_SN, device, prefix)


def _unpadded(valid_SN: Tensor, device: torch.device, prefix: int) -> Unpadded:
    slots_T, cu_seqlens, items, offsets, host_offsets = _unpad(valid_SN, device, prefix)
    before = prefix * torch.arange(valid_SN.shape[0] + 1, device=device, dtype=torch.int32)
    plan = PackPlan(cu_seqlens, None, items, offsets, host_offsets)
    return Unpadded(slots_T, valid_SN.shape[1], prefix, cu_seqlens - before, plan)


def whole(images: int, slots: int, device: torch.device, prefix: int = 0) -> Unpadded:
    """The same for a batch without padding. It is kept for the next batch of the shape, so that a CUDA graph can be
    made of it: nothing comes from the host but the first time, when that is waited for."""
    shape = (images, slots, device, prefix)
    if not nobody_watches():
        return _whole(*shape)
    pack, stream = _in_graphs.get(shape) or _kept_whole(*shape)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _in_graphs[shape] = pack, stream  # for ever: the graph will read it whenever it is replayed
        elif torch.cuda.current_stream(device) != stream:
            for part in (pack.slots_T, pack.cu_seqlens, pack.plan.cu_seqlens, pack.plan.items, pack.plan.offsets):
                part.record_stream(torch.cuda.current_stream(device))
    return pack


_in_graphs: dict[tuple, tuple[Unpadded, Any]] = {}


def _whole(images: int, slots: int, device: torch.device, prefix: int) -> Unpadded:
    pack = _unpadded(torch.ones(images, slots, dtype=torch.bool), device, prefix)
    return replace(pack, slots_T=torch.arange(images * slots, device=device))


@functools.lru_cache(16)
def _kept_whole(images: int, slots: int, device: torch.device, prefix: int) -> tuple[Unpadded, Any]:
    """And the stream that it was made on."""
    with torch.inference_mode(False):
        pack = _whole(images, slots, device, prefix)
    if device.type != "cuda":
        return pack, None
    stream = torch.cuda.current_stream(device)
    stream.synchronize()  # the next batch may be on another stream
    return pack, stream


@torch.library.custom_op("navit::unpad", mutates_args=())
def _unpad(valid_SN: Tensor, device: torch.device, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if valid_SN.device.type == "cpu":  # torch would share this little work among threads, which takes longer
        valid = valid_SN.numpy()
        lengths, slots_T = valid.sum(1).tolist(), torch.from_numpy(np.flatnonzero(valid))
        if device.type == "cuda":
            slots_T = slots_T.pin_memory()  # long enough for a copy from other memory to wait for the GPU
    else:
        lengths = valid_SN.sum(1).tolist()
        slots_T = torch.nonzero_static(valid_SN.flatten(), size=sum(lengths))[:, 0]
    plan = plan_pack([length + prefix for length in lengths], device)
    assert plan.host_offsets is not None
    return slots_T.to(device, non_blocking=True), plan.cu_seqlens, plan.items, plan.offsets, plan.host_offsets


@_unpad.register_fake
def _(valid_SN, device, prefix):  # type: ignore[no-untyped-def]
    images, tokens = valid_SN.shape[0], torch.library.get_ctx().new_dynamic_size()
    whole = {"device": device, "dtype": torch.int32}
    return (
        torch.empty(tokens, device=device, dtype=torch.int64),
        torch.empty(images + 1, **whole),
        torch.empty(max_items(tokens + prefix * images, images), ITEM_FIELDS, **whole),
        torch.empty(CLASSES + 1, **whole),
        torch.empty(_HOST_OFFSETS.shape, dtype=torch.int32),
    )
