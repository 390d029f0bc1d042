"""The attention that others ship, each behind one signature: attend(q_THD, k_THD, v_THD) -> out_THD, differentiable.

None of them norms q and k. README.md says where a user gets FlashAttention-3 and -4.
T tokens, H heads, D head width.
"""

import ctypes
import importlib
import importlib.util
import lzma
import os
import shutil
import site
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REQUIRED = ("fa3", "fa4", "torch_varlen")  # a published H100 result holds all of them
OPTIONAL = ("fa2", "flex_attention")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pack(NamedTuple):
    """Images packed one behind another: tokens per image on the host, their cumulative sum on the device."""

    lengths: Sequence[int]
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Peer:
    """prepare: what a model does once per pack. timer: how the peer can be timed (harness.py)."""

    prepare: Callable[[Pack], Attend]
    timer: str = "graph"


class PeerMissing(RuntimeError):
    """The peer is not installed, or not for this machine; the message says what is missing."""


def load(name: str, fa3_dir: str | None = None, fa4_dir: str | None = None) -> Peer:
    """Import one of REQUIRED, OPTIONAL, or "sdpa_loop", which runs everywhere. Raises PeerMissing."""
    if not torch.cuda.is_available() and name != "sdpa_loop":
        raise PeerMissing("there is no CUDA GPU")
    if name == "fa3":
        return _fa3(fa3_dir)
    if name == "fa4":
        return _fa4(fa4_dir)
    try:
        return {"fa2": _fa2, "torch_varlen": _torch_varlen, "flex_attention": _flex, "sdpa_loop": _sdpa_loop}[name]()
    except ImportError as error:
        raise PeerMissing(str(error)) from error


# FlashAttention-3: one shared library


def _fa3(folder: str | None) -> Peer:
    if torch.cuda.get_device_capability()[0] != 9:
        raise PeerMissing("FlashAttention-3 needs a Hopper GPU")
    if folder is None:
        package = importlib.util.find_spec("xformers")
        if package is None or package.origin is None:
            raise PeerMissing("no --fa3-dir, and xformers, whose wheel holds FlashAttention-3, is not installed")
        library = Path(package.origin).parent / "flash_attn_3" / "_C.so"
    else:
        library = _unpacked(Path(folder))
    try:
        ctypes.CDLL(
            str(Path(folder or "") / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL
        )  # it is linked against CUDA 12
        torch.ops.load_library(str(library))
    except OSError as error:
        raise PeerMissing(f"{library}: {error}") from error

    def prepare(pack: Pack) -> Attend:
        longest = max(pack.lengths)
        return lambda q_THD, k_THD, v_THD: _Fa3Attention.apply(q_THD, k_THD, v_THD, pack.cu_seqlens, longest)

    return Peer(prepare)


def _unpacked(folder: Path) -> Path:
    """The library in `folder`, unpacked into the temporary folder if it comes as fa3.so.xz."""
    if (folder / "fa3.so").exists():
        return folder / "fa3.so"
    target = Path(tempfile.gettempdir()) / f"fa3-{os.getuid()}.so"
    if not target.exists():
        with (
            lzma.open(folder / "fa3.so.xz") as packed,
            tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part,
        ):
            shutil.copyfileobj(packed, part)
        os.replace(part.name, target)
    return target


def fa3_forward(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_HT) of the loaded library."""
    out_THD, lse_HT, *_ = torch.ops.flash_attn_3.fwd(
        q_THD,
        k_THD,
        v_THD,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=q_THD.shape[-1] ** -0.5,
    )
    return out_THD, lse_HT


def fa3_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    longest: int,
) -> Tensor:
    """The three gradients as one (T, 3, H, D) tensor."""
    tokens, heads, width = q_THD.shape
    dqkv_T3HD = q_THD.new_empty(tokens, 3, heads, width)
    dq_THD, dk_THD, dv_THD = dqkv_T3HD.unbind(1)
    torch.ops.flash_attn_3.bwd(
        dout_THD,
        q_THD,
        k_THD,
        v_THD,
        out_THD,
        lse_HT,
        dq=dq_THD,
        dk=dk_THD,
        dv=dv_THD,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=width**-0.5,
    )
    return dqkv_T3HD


class _Fa3Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        out_THD, lse_HT = fa3_forward(q_THD, k_THD, v_THD, cu_seqlens, longest)
        ctx.save_for_backward(q_THD, k_THD, v_THD, out_THD, lse_HT, cu_seqlens)
        ctx.longest = longest
        return out_THD

    @staticmethod
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        return *fa3_backward(dout_THD, *ctx.saved_tensors, ctx.longest).unbind(1), None, None


# Python packages


def _fa4(folder: str | None) -> Peer:
    if folder is not None:
        site.addsitedir(folder)  # unlike a path entry, this honours the .pth file of the compiler it is written in
    try:
        attention = importlib.import_module("flash_attn.cute.interface").flash_attn_varlen_func
    except ImportError as error:
        raise PeerMissing(f"flash-attn-4: {error}") from error

    def prepare(pack: Pack) -> Attend:
        cu_seqlens, longest = pack.cu_seqlens, max(pack.lengths)

        def attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
            out = attention(
                q_THD,
                k_THD,
                v_THD,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
            )
            return out[0] if isinstance(out, tuple) else out

        return attend

    return Peer(prepare, timer="events")


def _fa2() -> Peer:
    attention = importlib.import_module("flash_attn.flash_attn_interface").flash_attn_varlen_func

    def prepare(pack: Pack) -> Attend:
        cu_seqlens, longest = pack.cu_seqlens, max(pack.lengths)
        return lambda q_THD, k_THD, v_THD: attention(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest)

    return Peer(prepare)


def _torch_varlen() -> Peer:
    attention = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def prepare(pack: Pack) -> Attend:
        cu_seqlens, longest = pack.cu_seqlens, max(pack.lengths)
        return lambda q_THD, k_THD, v_THD: attention(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest)

    return Peer(prepare)


def _flex() -> Peer:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # a timed backward runs many times after one forward
    torch._dynamo.config.recompile_limit = 64  # one compilation per shape, with and without gradients
    attention = torch.compile(flex_attention, dynamic=False)

    def prepare(pack: Pack) -> Attend:
        device, tokens = pack.cu_seqlens.device, sum(pack.lengths)
        image_T = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths)).to(device)

        def same_image(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return image_T[query] == image_T[key]

        mask = create_block_mask(same_image, None, None, tokens, tokens, device=device, _compile=True)

        def attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
            q, k, v = (x_THD.transpose(0, 1)[None] for x_THD in (q_THD, k_THD, v_THD))
            return attention(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return attend

    return Peer(prepare)


def _sdpa_loop() -> Peer:
    def prepare(pack: Pack) -> Attend:
        def attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
            images = zip(
                *(x_THD.transpose(0, 1).split(list(pack.lengths), 1) for x_THD in (q_THD, k_THD, v_THD)), strict=True
            )
            return torch.cat([F.scaled_dot_product_attention(q, k, v).transpose(0, 1) for q, k, v in images])

        return attend

    return Peer(prepare)
