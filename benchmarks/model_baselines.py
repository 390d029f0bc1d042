"""Whole models to measure ours against.

Straw: a vision transformer on cu_seqlens as a strong engineer assembles it in a day from stock parts: QK LayerNorm and
everything elementwise left to torch.compile, attention by FlashAttention-3 or torch's varlen_attn, F.embedding for
positions, a 16-bit residual stream. It has NaViT's parameters under NaViT's names, so that one state dict fits both and
the two can be compared number by number. It is given ready-made patches; ours starts from uint8 pixels.

The others are published packages, at their own arithmetic (biases, norms) with our sizes.

T tokens, S images, P patch values, E model width, H heads, D head width.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import peers
import torch
import torch.nn.functional as F
from peers import Attend, Pack
from torch import Tensor, nn

from navit import NaViTConfig

EPS = 1e-6


class Straw(nn.Module):
    """attend: attention inside each image; pool_attend(query_SHD, k_THD, v_THD): one query per image on its tokens.

    The residual stream and the branch that is to be added to it go from block to block apart, so that the addition and
    the next norm are one pass where the model is compiled block by block, too.
    """

    def __init__(self, config: NaViTConfig, attend: Attend, pool_attend: Attend) -> None:
        super().__init__()
        self.embed = StrawEmbedding(config)
        self.blocks = nn.ModuleList(StrawBlock(config, attend) for _ in range(config.depth))
        self.norm = StrawNorm(config.width)
        self.pool = StrawPool(config, pool_attend)

    @property
    def parts(self) -> list[nn.Module]:
        """What is compiled one by one: all of it."""
        return [self.embed, *self.blocks, self.pool]

    def forward(self, patches_TP: Tensor, coords_T2: Tensor, images: int) -> Tensor:
        x_TE, branch_TE = self.embed(patches_TP, coords_T2)
        for block in self.blocks:
            x_TE, branch_TE = block(x_TE, branch_TE)
        return self.pool(x_TE, branch_TE, self.norm, images)


class StrawEmbedding(nn.Module):
    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.channels * config.patch_size**2, config.width, bias=False)
        self.row_table = nn.Parameter(torch.empty(config.table_length, config.width))
        self.column_table = nn.Parameter(torch.empty(config.table_length, config.width))

    def forward(self, patches_TP: Tensor, coords_T2: Tensor) -> tuple[Tensor, Tensor]:
        x_TE = self.proj(patches_TP)
        rows_TE = F.embedding(coords_T2[:, 0], self.row_table)
        columns_TE = F.embedding(coords_T2[:, 1], self.column_table)
        return x_TE, (rows_TE + columns_TE).to(x_TE.dtype)


class StrawBlock(nn.Module):
    def __init__(self, config: NaViTConfig, attend: Attend) -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        self.heads, self.attend = config.heads, attend
        self.norm1, self.norm2 = StrawNorm(width), StrawNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm_weight = nn.Parameter(torch.ones(head_width))
        self.k_norm_weight = nn.Parameter(torch.ones(head_width))
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp = StrawMLP(width, config.mlp_width)

    def forward(self, x_TE: Tensor, branch_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TE = x_TE + branch_TE
        q_THD, k_THD, v_THD = self.qkv(self.norm1(x_TE)).unflatten(1, (3, self.heads, -1)).unbind(1)
        out_THD = self.attend(_unit(q_THD, self.q_norm_weight), _unit(k_THD, self.k_norm_weight), v_THD)
        x_TE = x_TE + self.proj(out_THD.flatten(1))
        return x_TE, self.mlp(self.norm2(x_TE))


class StrawPool(nn.Module):
    def __init__(self, config: NaViTConfig, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.query_HD = nn.Parameter(torch.empty(config.heads, config.width // config.heads))
        self.kv = nn.Linear(config.width, 2 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)
        self.norm = StrawNorm(config.width)
        self.mlp = StrawMLP(config.width, config.mlp_width)

    def forward(self, x_TE: Tensor, branch_TE: Tensor, norm: "StrawNorm", images: int) -> Tensor:
        normed_TE = norm(x_TE + branch_TE)
        k_THD, v_THD = self.kv(normed_TE).unflatten(1, (2, *self.query_HD.shape)).unbind(1)
        query_SHD = self.query_HD.to(k_THD.dtype).repeat(images, 1, 1)
        pooled_SHD = self.attend(query_SHD, _unit(k_THD), v_THD)
        x_SE = self.proj(pooled_SHD.flatten(1))
        return x_SE + self.mlp(self.norm(x_SE))


class StrawMLP(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width, bias=False)
        self.fc2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_TE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TE), approximate="tanh"))


class StrawNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TE: Tensor) -> Tensor:
        return _unit(x_TE, self.weight)


def _unit(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """LayerNorm of the last axis in float32, back in x's dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, eps=EPS).to(x.dtype)


def straw(config: NaViTConfig, pack: Pack, attention: str, fa3_dir: str | None = None) -> Straw:
    """attention: "fa3", "torch_varlen", or "sdpa_loop" for a CPU. Raises peers.PeerMissing."""
    peer = peers.load(attention, fa3_dir)
    attend = _fa3_for_compile(pack) if attention == "fa3" else peer.prepare(pack)
    return Straw(config, attend, _pool_loop(pack) if attention == "sdpa_loop" else _pool_varlen(pack))


def _pool_varlen(pack: Pack) -> Attend:
    attention = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    cu_seqlens, longest = pack.cu_seqlens, max(pack.lengths)
    ones = torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=torch.int32)
    return lambda query_SHD, k_THD, v_THD: attention(query_SHD, k_THD, v_THD, ones, cu_seqlens, 1, longest)


def _pool_loop(pack: Pack) -> Attend:
    def attend(query_SHD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        images = zip(query_SHD, *(x_THD.split(list(pack.lengths)) for x_THD in (k_THD, v_THD)), strict=True)
        return torch.stack(
            [
                F.scaled_dot_product_attention(q_HD[:, None], k.transpose(0, 1), v.transpose(0, 1))[:, 0]
                for q_HD, k, v in images
            ]
        )

    return attend


def _fa3_for_compile(pack: Pack) -> Attend:
    """FlashAttention-3 as an opaque op, so that torch.compile keeps one graph. The library is already loaded."""
    op, cu_seqlens, longest = _fa3_op(), pack.cu_seqlens, max(pack.lengths)
    return lambda q_THD, k_THD, v_THD: op(q_THD, k_THD, v_THD, cu_seqlens, longest)[0]


@functools.cache
def _fa3_op() -> Callable[..., tuple[Tensor, Tensor]]:
    @torch.library.custom_op("navit_benchmarks::fa3", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        return peers.fa3_forward(q, k, v, cu_seqlens, longest)

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    @torch.library.custom_op("navit_benchmarks::fa3_backward", mutates_args=())
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        return peers.fa3_backward(dout, q, k, v, out, lse, cu_seqlens, longest)

    @backward.register_fake
    def _(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        return q.new_empty(q.shape[0], 3, *q.shape[1:])

    def keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.longest = inputs
        ctx.save_for_backward(*tensors, *output)

    def gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        dqkv = torch.ops.navit_benchmarks.fa3_backward(dout, q, k, v, out, lse, cu_seqlens, ctx.longest)
        return *dqkv.unbind(1), None, None

    forward.register_autograd(gradient, setup_context=keep)
    return forward


# Published packages


def vit_pytorch_module(nested: bool) -> Any:
    """The module of one of vit-pytorch's NaViTs, patched so that the nested one trains its input side."""
    try:
        module = importlib.import_module("vit_pytorch.na_vit_nested_tensor" if nested else "vit_pytorch.na_vit")
    except ImportError as error:
        raise peers.PeerMissing(str(error)) from error
    if nested:
        module.nested_tensor = lambda parts, **options: torch.nested.as_nested_tensor(list(parts), **options)
    return module


def vit_pytorch(config: NaViTConfig, images: Sequence[Tensor], nested: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """vit-pytorch's NaViT on float images: dense masks over rows of 2,048 tokens, or nested tensors.

    As shipped, the nested one makes leaves of its tokens and pooling queries, so that nothing before them trains; here
    they keep their history. Both run eagerly: they read sizes on the host.
    """
    model = vit_pytorch_module(nested).NaViT(
        image_size=config.table_length * config.patch_size,
        patch_size=config.patch_size,
        num_classes=config.width,
        dim=config.width,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.width // config.heads,
        mlp_dim=config.mlp_width,
        token_dropout_prob=0.0 if nested else None,
    )
    images = list(images)
    return model, functools.partial(model, images) if nested else functools.partial(model, images, group_images=True)


def timm_naflexvit(
    config: NaViTConfig, patches_TP: Tensor, coords_T2: Tensor, lengths: Sequence[int]
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """timm's NaFlexVit, every image padded to the longest of the pack; factorized positions, MAP pooling, QK norm."""
    try:
        naflexvit = importlib.import_module("timm.models.naflexvit")
    except ImportError as error:
        raise peers.PeerMissing(str(error)) from error
    model = naflexvit.NaFlexVit(
        naflexvit.NaFlexVitCfg(
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_width / config.width,
            qkv_bias=False,
            qk_norm=True,
            pos_embed="factorized",
            pos_embed_grid_size=(config.table_length, config.table_length),
            global_pool="map",
        ),
        num_classes=0,
    ).to(patches_TP.device)
    valid_SN = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    valid_SN = valid_SN.to(patches_TP.device)
    patches, coords = (
        x.new_zeros(*valid_SN.shape, x.shape[1]).masked_scatter_(valid_SN[..., None], x)
        for x in (patches_TP, coords_T2.long())
    )
    return model, functools.partial(model, {"patches": patches, "patch_coord": coords, "patch_valid": valid_SN})
