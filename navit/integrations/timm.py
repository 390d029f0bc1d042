"""timm's NaFlexVit on packed images: one call, the same weights, the same inputs, the same outputs.

    model = accelerate(timm.create_model("naflexvit_base_patch16_gap", pretrained=True))

timm pads every image of a batch to the longest one and masks. Here the patches are unpadded before the embedding, once;
what follows runs on cu_seqlens, and is padded again only where a caller asks for padded features.

S images, N patches of each with padding, T tokens of the pack, R prefix (class and register) tokens, P patch values,
E model width, H heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from navit_kernels import (
    HeadNorm,
    PackPlan,
    add_norm,
    add_positions,
    attention_pool,
    pool_tokens,
    varlen_attention_qkvpacked,
)
from navit_kernels._autocast import autocast_dtype
from navit_kernels._checks import fail
from navit_kernels.block import Options, Parameters, only_multiply
from navit_kernels.block import block as one_op
from navit_kernels.head_norm import NORM_CODES

from . import require
from .padding import Unpadded, unpad, whole
from .resampling import MODES, resampled_positions


def accelerate(model: nn.Module) -> nn.Module:
    """Make a timm NaFlexVit run on packs, in place; returns it.

    Parameters, buffers, names and all methods stay. `forward` and `forward_features` take what they took: the dict of
    timm's loader (patches, patch_coord, patch_valid), the same as arguments, or a batch of images. The outputs are the
    same, and so are all gradients; what padding holds differs: `forward_features` gives zeros there. A random choice is
    made as timm makes it, so that a seed drops the same patches and paths; only element-wise dropout differs.
    `forward_intermediates` stays timm's own, padded. Blocks are not called as modules: hooks on them do not fire, and
    what compiles or shards them one by one must take the whole model instead. Nor, on a GPU, are a block's four linear
    layers, but where one of them has hooks or is another class than nn.Linear.

    The lengths in patch_valid are waited for, once per forward; nothing else is (timm's own waits for the grid of every
    image). Leave patch_valid on the CPU, the rest on the GPU, and there is no wait at all, unless patches are dropped.
    Nor is there for a batch of images. Without padding, only the first batch of a shape is waited for, and a forward
    can be recorded as a CUDA graph (`navit.graphs.Captured`). torch.compile works with fullgraph=True, too.

    Positions, as timm's, take patches to stand row by row from the first one, unless pos_embed_use_grid_sample is set,
    which reads patch_coord. An image without a valid patch pools to zeros.

    Raises ImportError without timm 1.0.29 or newer, TypeError for another model, and NotImplementedError, naming the
    option, for an architecture that is not covered: rotary positions and other attention than timm's standard one
    (rope_type, attn_type, attn_gated, attn_only_layer_scale, num_kv_heads, swiglu_mlp, block_fn, attn_layer),
    attn_drop_rate, norm_layer other than layer norm and RMS norm, mlp_layer that mixes tokens, and
    pos_embed_interp_mode other than bilinear and bicubic. `forward` raises NotImplementedError for an attn_mask.
    """
    if isinstance(model, PackedForward):
        return model
    require("timm", "1.0.29", "timm")
    from timm.models.naflexvit import NaFlexVit

    if type(model) is not NaFlexVit:
        raise TypeError(f"model must be a timm NaFlexVit, got {type(model).__name__}")
    _check_options(model)
    model.__class__ = _packed_class()
    return model


@functools.cache
def _packed_class() -> type:
    from timm.models.naflexvit import NaFlexVit

    return type("PackedNaFlexVit", (PackedForward, NaFlexVit), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """PackedNaFlexVit exists once timm is imported; unpickling asks for it here."""
    if name == "PackedNaFlexVit":
        return _packed_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


class PackedForward(nn.Module):
    """What NaFlexVit's methods become. All attributes are timm's."""

    attn_pool: Any
    blocks: Any
    embeds: Any
    fc_norm: nn.Module
    global_pool: str
    grad_checkpointing: bool
    head: nn.Module
    head_drop: nn.Module
    norm: nn.Module
    norm_pre: nn.Module
    num_prefix_tokens: int
    patch_drop: Any
    pool_include_prefix: bool

    def forward(
        self,
        x: Tensor | dict[str, Tensor],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """(S, num_classes), or (S, R + N, num_classes) without pooling; see `accelerate`."""
        patches: Any = x
        if isinstance(x, dict):
            patches, attn_mask = x["patches"], x.get("attn_mask", attn_mask)
            patch_coord, patch_valid = x.get("patch_coord", patch_coord), x.get("patch_valid", patch_valid)
            if patch_coord is None:
                fail("patch_coord", "given beside patches", None)
        if patch_coord is not None and patch_valid is None:
            fail("patch_valid", "given beside patch_coord", None)
        x_TE, pack, _ = self._encode(patches, patch_coord, patch_valid, attn_mask)
        pooled = self._pool_pack(x_TE, pack) if self.attn_pool is not None or self.global_pool else pack.pad(x_TE)
        return self.head(self.head_drop(self.fc_norm(pooled)))

    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor | None]:
        """(S, R + N, E) features of images; of patches the same in a dict, with which of them are valid, as timm."""
        x_TE, pack, valid_SN = self._encode(patches, patch_coord, patch_valid, attn_mask)
        padded = pack.pad(x_TE)
        return padded if patch_coord is None else {"patches": padded, "patch_valid": valid_SN}

    def _encode(
        self, patches: Tensor, coords_SN2: Tensor | None, valid_SN: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Unpadded, Tensor | None]:
        """Embedding, blocks and last norm, on the pack; and which patches are valid among those not dropped."""
        if attn_mask is not None:
            raise NotImplementedError("attn_mask is not supported: tokens attend to all of their own image")
        if coords_SN2 is None:
            x_TE, pack = self._embed_images(patches)
        else:
            index_SN = self._kept(patches)
            if valid_SN is not None and index_SN is not None:
                valid_SN = valid_SN.gather(1, index_SN.to(valid_SN.device))
            images, slots = patches.shape[:2] if index_SN is None else index_SN.shape
            if valid_SN is None:
                pack = whole(images, slots, patches.device, self.num_prefix_tokens)
            else:
                pack = unpad(valid_SN.bool(), patches.device, self.num_prefix_tokens)
            x_TE = self._embed_patches(patches, coords_SN2, index_SN, pack)
        x_TE = self.norm_pre(x_TE)
        following = [*(block.norm1 for block in self.blocks), self.norm]
        x_TE, normed_TE = _add_norm(x_TE, None, following[0], dtype=autocast_dtype(x_TE.device))
        for block, norm in zip(self.blocks, following[1:], strict=True):
            if self.grad_checkpointing:
                x_TE, normed_TE = checkpoint(_block, block, x_TE, normed_TE, norm, pack.plan, use_reentrant=False)
            else:
                x_TE, normed_TE = _block(block, x_TE, normed_TE, norm, pack.plan)
        return normed_TE, pack, valid_SN

    def _kept(self, patches: Tensor) -> Tensor | None:
        """(S, N') places of the patches that a training step keeps, padding drawn among them as timm does; or None."""
        if not self.training or self.patch_drop is None:
            return None
        images, slots = patches.shape[:2]
        return self.patch_drop(patches.new_empty(images, self.num_prefix_tokens + slots, 0))[1]

    def _embed_images(self, images: Tensor) -> tuple[Tensor, Unpadded]:
        """Images of one size have no padding: timm's embedding serves."""
        x_SNE, _ = self.embeds(images)
        if self.training and self.patch_drop is not None:
            x_SNE, _ = self.patch_drop(x_SNE)
        count, rows = x_SNE.shape[:2]
        return x_SNE.flatten(0, 1), whole(count, rows - self.num_prefix_tokens, x_SNE.device, self.num_prefix_tokens)

    def _embed_patches(self, patches: Tensor, coords_SN2: Tensor, index_SN: Tensor | None, pack: Unpadded) -> Tensor:
        """Embed the pack's patches, add positions, put prefix tokens before each image's."""
        embeds, slots, image_T = self.embeds, patches.shape[1], pack.image_T
        index_T = pack.slots_T % pack.slots
        if index_SN is not None:
            index_T = index_SN.flatten().index_select(0, pack.slots_T)
        place_T = image_T * slots + index_T
        x_TE = embeds.norm(_project(embeds, patches.flatten(0, 1).index_select(0, place_T)))
        if embeds.pos_embed_type != "none":
            sizes_T2 = (coords_SN2.amax(1) + 1).index_select(0, image_T)
            if embeds.pos_embed_use_grid_sample:
                coords_T2 = coords_SN2.flatten(0, 1).index_select(0, place_T)
            else:
                row_T, column_T = index_T // sizes_T2[:, 1], index_T % sizes_T2[:, 1]
                coords_T2 = torch.stack([torch.where(row_T < sizes_T2[:, 0], row_T, -1), column_T], 1)
            x_TE = _add_positions(embeds, x_TE, coords_T2, sizes_T2)
        prefix = [token[0] for token in (embeds.cls_token, embeds.reg_token) if token is not None]
        if prefix:
            x_TE = pack.with_prefix(x_TE, torch.cat(prefix))
        return embeds.pos_drop(x_TE)

    def _pool_pack(self, x_TE: Tensor, pack: Unpadded) -> Tensor:
        """(S, E), one vector per image."""
        pool, cu_seqlens = self.attn_pool, pack.plan.cu_seqlens
        if pool is None and self.global_pool == "token":
            return pool_tokens(x_TE, cu_seqlens, "first")
        if not self.pool_include_prefix:
            x_TE, cu_seqlens = pack.without_prefix(x_TE), pack.cu_seqlens
        if pool is not None:
            heads = (pool.num_heads, pool.head_dim)
            k_THD, v_THD = pool.kv(x_TE).unflatten(1, (2, *heads)).unbind(1)
            query_HD = pool.q(pool.latent[0, 0]).unflatten(0, heads)
            pooled_SE = pool.proj_drop(pool.proj(attention_pool(query_HD, k_THD, v_THD, cu_seqlens).flatten(1)))
            return pooled_SE + pool.mlp(pool.norm(pooled_SE))
        kinds = {"avg": ["mean"], "max": ["max"], "avgmax": ["mean", "max"]}[self.global_pool]
        return torch.stack([pool_tokens(x_TE, cu_seqlens, kind) for kind in kinds]).mean(0)


def _project(embeds: Any, patches: Tensor) -> Tensor:
    """(T, P) patches, or (T, height, width, channels) ones of any patch size, to (T, E)."""
    if not embeds.is_linear:
        fail("patches", "images (S, C, H, W) where embed_proj_type is 'conv'", "patches with patch_coord")
    if embeds.enable_patch_interpolator and patches.dim() == 4:
        patch_size = tuple(patches.shape[1:3] if embeds.channels_last else patches.shape[2:4])
        weights = (embeds.proj.weight, embeds.proj.bias)
        return embeds.patch_interpolator(patches[None], *weights, patch_size=patch_size, is_linear=True)[0]
    patches = patches.flatten(1)
    return embeds.proj(patches if embeds.norm_input is None else embeds.norm_input(patches))


def _add_positions(embeds: Any, x_TE: Tensor, coords_T2: Tensor, sizes_T2: Tensor) -> Tensor:
    """x + the position table, stretched over each image's grid of sizes_T2; x alone for a token in a negative row."""
    stretched_T2 = sizes_T2
    if embeds.pos_embed_ar_preserving:
        stretched_T2 = sizes_T2.amax(1, keepdim=True).expand(-1, 2)
    if embeds.pos_embed_type == "factorized":
        tables, places = (embeds.pos_embed_y[0], embeds.pos_embed_x[0]), []
        for axis, table_LE in enumerate(tables):
            length = table_LE.shape[0]
            place_T = (coords_T2[:, axis] + 0.5) * (length / stretched_T2[:, axis]) - 0.5
            places.append(torch.where(coords_T2[:, 0] < 0, length, place_T.clamp(0, length - 1)))
        with_zeros = (pad(table_LE, (0, 0, 0, 1)) for table_LE in tables)
        return add_positions(x_TE, torch.stack(places, 1), *with_zeros)
    table_RCE, grid_sample = embeds.pos_embed[0], embeds.pos_embed_use_grid_sample
    if not grid_sample:  # a grid of the table's own size takes the table as it is
        rows, columns = table_RCE.shape[:2]
        own_T = (sizes_T2[:, 0] == rows) & (sizes_T2[:, 1] == columns)
        stretched_T2 = torch.where(own_T[:, None], sizes_T2, stretched_T2)
    positions_TE = resampled_positions(
        table_RCE, coords_T2, stretched_T2, embeds.pos_embed_interp_mode,
        antialias=not grid_sample and getattr(embeds, "pos_embed_antialias", True),  # options of timm 1.0.31
        align_corners=getattr(embeds, "pos_embed_align_corners", False),
    )  # fmt: skip
    return x_TE + positions_TE.to(x_TE.dtype)


def _block(block: Any, x_TE: Tensor, normed_TE: Tensor, following: nn.Module, plan: PackPlan) -> tuple[Tensor, Tensor]:
    """A timm Block: from the stream and its norm to the stream and the norm that follows."""
    attn, cu_seqlens = block.attn, plan.cu_seqlens
    whole = _as_one_op(block, following)
    if whole is not None:
        images = cu_seqlens.shape[0] - 1
        keep_1_S, keep_2_S = (_keep_scale(path, images, x_TE.device) for path in (block.drop_path1, block.drop_path2))
        return one_op(x_TE, normed_TE, *whole, cu_seqlens, plan, keep_1_S, keep_2_S)
    qkv_T3HD = attn.qkv(normed_TE).unflatten(1, (3, attn.num_heads, attn.head_dim))
    q_norm, k_norm = (
        None if isinstance(norm, nn.Identity) else HeadNorm(*_norm(norm)) for norm in (attn.q_norm, attn.k_norm)
    )
    out_THD = varlen_attention_qkvpacked(qkv_T3HD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, plan=plan)
    branch_TE = attn.proj_drop(attn.proj(attn.norm(out_THD.flatten(1))))
    x_TE, normed_TE = _add_norm(x_TE, branch_TE, block.norm2, block.ls1, block.drop_path1, cu_seqlens)
    return _add_norm(x_TE, block.mlp(normed_TE), following, block.ls2, block.drop_path2, cu_seqlens)


def _as_one_op(block: Any, following: Any) -> tuple[Parameters, Options] | None:
    """The block as `one_op` takes it; None for one that has more to it, or whose linear layers are watched or are not
    what they were."""
    from timm import layers

    attn, mlp, norm = block.attn, block.mlp, block.norm2
    if type(mlp) is not layers.Mlp or isinstance(following, nn.Identity):
        return None
    linears, act = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), type(mlp.act)
    drops = block.training and (attn.proj_drop.p > 0 or mlp.drop1.p > 0 or mlp.drop2.p > 0)
    is_gelu = act in (layers.GELU, layers.GELUTanh, nn.GELU)
    if not only_multiply(*linears) or drops or not is_gelu or not (type(attn.norm) is type(mlp.norm) is nn.Identity):
        return None
    tanh = act is layers.GELUTanh or (act is nn.GELU and mlp.act.approximate == "tanh")
    qkv, proj, fc1, fc2 = linears
    q_norm, k_norm = (
        (None, None, None, 1e-6) if isinstance(part, nn.Identity) else _norm(part)
        for part in (attn.q_norm, attn.k_norm)
    )
    kinds = [_norm(part) for part in (norm, following)]
    parameters = Parameters(
        qkv.weight, proj.weight, fc1.weight, fc2.weight, norm.weight, following.weight, None, None, qkv.bias, proj.bias,
        fc1.bias, fc2.bias, q_norm[1], q_norm[2], k_norm[1], k_norm[2], kinds[0][2], kinds[1][2],
        getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None),
    )  # fmt: skip
    options = Options(
        attn.num_heads, attn.scale, "gelu_tanh" if tanh else "gelu", NORM_CODES[q_norm[0]], q_norm[3],
        NORM_CODES[k_norm[0]], k_norm[3], kinds[0][0] == "layer_norm", norm.eps, kinds[1][0] == "layer_norm",
        following.eps,
    )  # fmt: skip
    return parameters, options


def _keep_scale(drop_path: nn.Module | None, images: int, device: torch.device) -> Tensor | None:
    """Drawn once per image of the pack; None where all are kept."""
    if drop_path is None or not drop_path.training or isinstance(drop_path, nn.Identity):
        return None
    return drop_path(torch.ones(images, device=device))


def _add_norm(
    x_TE: Tensor,
    branch_TE: Tensor | None,
    norm: nn.Module,
    layer_scale: nn.Module | None = None,
    drop_path: nn.Module | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + drop_path(layer_scale(branch)), and its norm, of the branch's dtype or the one given."""
    gamma_E = getattr(layer_scale, "gamma", None)
    keep_S = None if cu_seqlens is None else _keep_scale(drop_path, cu_seqlens.shape[0] - 1, x_TE.device)
    if isinstance(norm, nn.Identity):
        if branch_TE is None:
            return x_TE, x_TE
        if gamma_E is not None:
            branch_TE = branch_TE * gamma_E
        if keep_S is not None:
            assert cu_seqlens is not None
            keep_T = keep_S.repeat_interleave(cu_seqlens.diff(), output_size=x_TE.shape[0])
            branch_TE = branch_TE * keep_T[:, None].to(branch_TE.dtype)
        x_TE = x_TE + branch_TE
        return x_TE, x_TE
    kind, weight_E, bias_E, eps = _norm(norm)
    return add_norm(
        x_TE, branch_TE, weight_E, bias_E, kind=kind, eps=eps, layer_scale_E=gamma_E, keep_scale_S=keep_S,
        cu_seqlens=cu_seqlens, out_dtype=dtype,
    )  # fmt: skip


def _norm(norm: Any) -> tuple[str, Tensor, Tensor | None, float]:
    """kind, weight, bias and eps."""
    kind = "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"
    return kind, norm.weight, getattr(norm, "bias", None), norm.eps


def _check_options(model: Any) -> None:
    """Raise NotImplementedError for the first option of the constructor that is not covered, as the modules show it."""
    from timm import layers
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block

    norms = (nn.LayerNorm, layers.LayerNorm, layers.LayerNormFp32, layers.RmsNorm, layers.RmsNormFp32)
    mlps = (layers.Mlp, layers.GluMlp, layers.SwiGLU)

    def refuse(option: str, got: object) -> None:
        raise NotImplementedError(f"{option} is not supported: the model has {got}")

    if model.rope is not None:
        refuse("rope_type", type(model.rope).__name__)
    mode = model.embeds.pos_embed_interp_mode
    if model.embeds.pos_embed_type == "learned" and mode not in MODES:
        refuse("pos_embed_interp_mode other than bilinear and bicubic", mode)
    for block in model.blocks:
        if type(block) is EvaBlock:
            refuse("attn_type, attn_gated, attn_only_layer_scale, num_kv_heads or swiglu_mlp", "blocks of EvaBlock")
        if type(block) is not Block:
            refuse("block_fn", f"blocks of {type(block).__name__}")
        if type(block.attn) is not layers.Attention:
            refuse("attn_layer", type(block.attn).__name__)
        if getattr(block.attn, "gate", None) is not None:
            refuse("attn_gated", "gates")
        if block.attn.attn_drop.p:
            refuse("attn_drop_rate", block.attn.attn_drop.p)
        if type(block.mlp) not in mlps:
            refuse("mlp_layer other than Mlp, GluMlp and SwiGLU", type(block.mlp).__name__)
        identities = (norm for norm in (block.attn.q_norm, block.attn.k_norm) if not isinstance(norm, nn.Identity))
        for norm in (block.norm1, block.norm2, *identities):
            if type(norm) not in norms or norm.weight is None:
                refuse("norm_layer other than layer norm and RMS norm, with weights", norm)
    if not isinstance(model.norm, (nn.Identity, *norms)):
        refuse("norm_layer other than layer norm and RMS norm, with weights", model.norm)
