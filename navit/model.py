"""NaViT: a vision transformer on packed images of any size (Dehghani et al. 2023, arXiv 2307.06304).

The residual stream has the dtype that the matrix products have: that of the weights, or autocast's. Sums, norms and
positions are computed in float32 at least and rounded once.

T tokens, S images, P patch values, E model width, H heads, D head width, M MLP width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from navit_kernels import (
    HeadNorm,
    PackPlan,
    add_norm,
    add_positions,
    attention_pool,
    feed_forward,
    patchify,
    pool_tokens,
    positions,
)
from navit_kernels._autocast import autocast_dtype
from navit_kernels._checks import fail
from navit_kernels.block import Layers, Options, Parameters, block, only_multiply
from navit_kernels.head_norm import NORM_CODES
from navit_kernels.mlp.reference import activate
from navit_kernels.patches import KeptPatches

from .config import NaViTConfig
from .packing import PackedImages, in_given_order, pack

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class NaViT(nn.Module):
    """A vision transformer on images of any size; see `forward`."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.prefix_RE = nn.Parameter(torch.empty(config.prefix_tokens, config.width)) if config.prefix_tokens else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = Norm(config)
        self.pool = AttentionPool(config) if config.pool == "map" else None
        self.head = nn.Linear(config.width, config.num_classes, config.bias) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for small in (self.prefix_RE, getattr(self.head, "weight", None)):
            if small is not None:
                nn.init.trunc_normal_(small, std=0.02)

    def forward(
        self, images: PackedImages | Sequence[Any], dense: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """One row per image, in the order given: (S, num_classes) logits, or (S, E) embeddings without classes.

        images: (C, H, W) uint8 or float tensors; lists of them, each list one pack; a PackedImages on the model's
            device; or the packs that `pack` made of one list.
        dense: also return the features of each image's patches, one (rows, columns, E) tensor per image. Reads the grid
            sizes on the host. Raises ValueError where tokens were dropped.
        """
        if not isinstance(images, PackedImages):
            return self._forward_list(images, dense)
        packed = images
        patches_TP = self._patches(packed)
        x_TE = self.embed(patches_TP, packed)
        del patches_TP  # not held while the blocks run
        x_TE, prefix_SRE = self._encode(x_TE, packed)
        pooled_SE = self._pooled(x_TE, prefix_SRE, packed)
        rows = self.head(pooled_SE)
        if packed.padded:
            rows = rows[: len(packed)]
        return (rows, split_images(x_TE, packed)) if dense else rows

    def _forward_list(self, images: Sequence[Any], dense: bool) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Pack a list of images, or of lists of images; or take its packs. Run them and restore the order."""
        images, weight = list(images), self.embed.proj.weight
        packs: list[PackedImages] = []
        if all(isinstance(part, PackedImages) for part in images):
            packs = images
        elif all(isinstance(part, (Tensor, list, tuple)) for part in images):
            count = 0
            for group in [images] if isinstance(images[0], Tensor) else images:
                packs += [replace(p, order=p.order + count) for p in pack(group, None, **self.config.pack_options)]
                count += len(group)
        else:
            kinds = sorted({type(part).__name__ for part in images})
            fail("images", "a PackedImages, a list of (C, H, W) tensors, lists of them, or packs", f"a list of {kinds}")
        if not packs:
            none = weight.new_zeros(0, self.config.num_classes or self.config.width)
            return (none, []) if dense else none
        packs = [packed.to(weight.device) for packed in packs]
        if not dense:
            return in_given_order([self(packed) for packed in packs], packs)
        rows, features = zip(*(self(packed, dense=True) for packed in packs), strict=True)
        places = torch.cat([packed.order for packed in packs]).argsort().tolist()
        flat = [part for parts in features for part in parts]
        return in_given_order(rows, packs), [flat[place] for place in places]

    def _patches(self, packed: PackedImages) -> Tensor:
        """(T, P) normalized patches in the dtype of the matrix products."""
        config, weight = self.config, self.embed.proj.weight
        for name, got in (("patch_size", packed.patch_size), ("prefix_tokens", packed.prefix_tokens)):
            if got != getattr(config, name):
                fail(f"the pack's {name}", f"the model's, {getattr(config, name)}", got)
        dtype = autocast_dtype(weight.device) or weight.dtype
        if packed.patches is not None:
            return packed.patches.to(dtype)
        if packed.pixels is None:
            raise ValueError("the pack must hold pixels or patches, got neither")
        keep = KeptPatches(packed.cu_seqlens, packed.coords)
        return patchify(packed.pixels, config.patch_size, config.mean, config.std, keep=keep, dtype=dtype)

    def _encode(self, x_TE: Tensor, packed: PackedImages) -> tuple[Tensor, Tensor | None]:
        """The blocks and the last norm: patches' tokens (T, E), and prefix tokens (S, R, E) or None."""
        config, images = self.config, packed.segments
        cu_seqlens, tokens = packed.cu_seqlens, x_TE.shape[0]
        if self.prefix_RE is not None:  # an image's tokens: its prefix, then its patches
            count = config.prefix_tokens
            token_T = torch.arange(tokens, device=x_TE.device, dtype=torch.int32)
            image_T = torch.searchsorted(cu_seqlens, token_T, right=True)
            patch_places_T = token_T + count * image_T
            cu_seqlens = cu_seqlens + count * torch.arange(images + 1, device=x_TE.device, dtype=torch.int32)
            prefix_places = (cu_seqlens[:-1, None] + torch.arange(count, device=x_TE.device)).flatten()
            prefix = self.prefix_RE.to(x_TE.dtype).repeat(images, 1)
            x_TE = x_TE.new_empty(tokens + count * images, config.width).index_copy(0, patch_places_T, x_TE)
            x_TE = x_TE.index_copy(0, prefix_places, prefix)
        keep = self._keep_scales(images, x_TE.device)
        layers = cast("list[Block]", list(self.blocks))
        following = [layer.norm1 for layer in layers] + [self.norm]
        x_TE, normed_TE = following[0](x_TE, out_dtype=autocast_dtype(x_TE.device))
        for index, layer in enumerate(layers):
            inputs = (x_TE, normed_TE, following[index + 1], cu_seqlens, packed.plan, keep[index])
            if config.checkpointing == "block":
                x_TE, normed_TE = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TE, normed_TE = layer(*inputs)
        if self.prefix_RE is None:
            return normed_TE, None
        prefix_SRE = normed_TE.index_select(0, prefix_places).unflatten(0, (images, count))
        return normed_TE.index_select(0, patch_places_T), prefix_SRE

    def _keep_scales(self, images: int, device: torch.device) -> Sequence[Tensor | None]:
        """Per block (2, S): 1 / (1 − rate) for an image whose branch is kept, 0 for one whose branch is dropped."""
        config = self.config
        if not self.training or config.drop_path == 0:
            return [None] * config.depth
        keep = 1 - torch.linspace(0, config.drop_path, config.depth, device=device)[:, None, None]
        return ((torch.rand(config.depth, 2, images, device=device) < keep) / keep).unbind(0)

    def _pooled(self, x_TE: Tensor, prefix_SRE: Tensor | None, packed: PackedImages) -> Tensor:
        if self.pool is not None:
            return self.pool(x_TE, packed.cu_seqlens)
        if prefix_SRE is not None and self.config.pool == "cls":
            return prefix_SRE[:, 0]
        return pool_tokens(x_TE, packed.cu_seqlens, self.config.pool)

    def resize_positions(self, table_length: int) -> None:
        """Stretch the position tables to more (or fewer) rows; learned ones are interpolated."""
        weight, tables = self.embed.proj.weight, self.embed.state_dict()
        for name in tables.keys() & {"row_table", "column_table"}:
            tables[name] = positions.resize_table(tables[name], table_length)
        self.config = replace(self.config, table_length=table_length)
        self.embed = Embedding(self.config).to(weight)
        self.embed.load_state_dict(tables)

    def export(self, example: PackedImages) -> torch.export.ExportedProgram:
        """The evaluating model as a program of torch.export, for packs of any number of tokens and images.

        The program's inputs are the tensors of a pack, its plan's included; its other fields must be the example's. It
        calls the ops of navit_kernels, so that package must be imported where the program runs. The example and the
        model are on a GPU, or both on "meta": the references that run on a CPU read sizes on the host.
        """
        sizes = torch.export.ShapesCollection()
        for leaf in tree_leaves(example):
            if isinstance(leaf, Tensor):
                sizes[leaf] = {0: torch.export.Dim.DYNAMIC}
        shapes = sizes.dynamic_shapes(self, (example,))
        return torch.export.export(self.eval(), (example,), dynamic_shapes=shapes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu", **changes: Any) -> NaViT:
        """Read what `save_pretrained` wrote. changes: fields of the configuration, such as checkpointing="mlp".

        Raises FileNotFoundError for a missing file, ValueError for a field that no configuration has and for weights
        that do not fit it.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: not a saved NaViT")
        given = {**json.loads((folder / CONFIG).read_text()), **changes}
        known = {field.name for field in fields(NaViTConfig)}
        if given.keys() - known:
            fail(f"fields of {folder / CONFIG}", "fields of NaViTConfig", sorted(given.keys() - known))
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        model = cls(NaViTConfig(**given))
        state, wanted = load_file(folder / WEIGHTS), model.state_dict()
        found, expected = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (state, wanted))
        wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        for name in wrong[:1]:
            wanted_shape = f"{expected.get(name, 'absent')} ({len(wrong)} tensors differ)"
            fail(f"{name} in {folder / WEIGHTS}", wanted_shape, found.get(name, "none"))
        model.load_state_dict(state)
        return model.to(device)


class Norm(nn.Module):
    """The norm before a branch, taken together with the addition of the branch before it."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.bias else None

    def forward(self, x_TE: Tensor, branch_TE: Tensor | None = None, **scales: Any) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm."""
        return add_norm(x_TE, branch_TE, self.weight, self.bias, kind=self.kind, **scales)


class Embedding(nn.Module):
    """Patches to tokens, with where they stand."""

    row_table: Tensor
    column_table: Tensor
    row_frequencies: Tensor
    column_frequencies: Tensor

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.channels * config.patch_size**2, config.width, config.bias)
        self.norm = nn.LayerNorm(config.width, eps=1e-6, bias=config.bias) if config.embed_norm else None
        length, width = config.table_length, config.width // (2 if config.combine == "concat" else 1)
        for name in ("row", "column"):
            if config.positions == "learned":
                table = nn.Parameter(torch.empty(length, width))
                nn.init.trunc_normal_(table, std=0.02**0.5 if config.combine == "product" else 0.02)
                self.register_parameter(f"{name}_table", table)
            elif config.positions == "fourier":
                self.register_parameter(
                    f"{name}_frequencies", nn.Parameter(positions.fourier_frequencies(length, width))
                )
            else:
                self.register_buffer(f"{name}_table", positions.sinusoidal_table(length, width), persistent=False)

    def forward(self, patches_TP: Tensor, packed: PackedImages) -> Tensor:
        config, length = self.config, self.config.table_length
        if config.positions == "fourier":
            tables = [positions.fourier_table(length, f) for f in (self.row_frequencies, self.column_frequencies)]
        else:
            tables = [self.row_table, self.column_table]
        coords_T2 = packed.coords
        if config.coordinates == "fractional":
            coords_T2 = positions.fractional_coords(coords_T2, packed.grids, packed.cu_seqlens, length)
        norm = None if self.norm is None else (self.norm.weight, self.norm.bias, self.norm.eps)
        return add_positions(self._project(patches_TP), coords_T2, *tables, combine=config.combine, norm=norm)

    def _project(self, patches_TP: Tensor) -> Tensor:
        """The projection; with zeros behind each row where 8 values do not divide it, as 14 × 14 × 3: for rows that
        do not start at 16 bytes there are slow products alone."""
        extra = -patches_TP.shape[1] % 8
        if extra == 0:
            return self.proj(patches_TP)
        weight_EP = pad(self.proj.weight, (0, extra))
        return linear(pad(patches_TP, (0, extra)), weight_EP, self.proj.bias)


class Block(nn.Module):
    """Attention and MLP, each a branch of the residual stream. One op multiplies by the layers' weights; layers with
    hooks, or of another class than nn.Linear, are called instead, one by one, which takes the host longer."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        self.config = config
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.qkv = nn.Linear(width, 3 * width, config.bias)
        self.proj = nn.Linear(width, width, config.bias)
        self.mlp = MLP(config)
        normed, biased = config.qk_norm != "none", config.qk_norm != "none" and config.bias
        self.q_norm_weight = nn.Parameter(torch.ones(head_width)) if normed else None
        self.q_norm_bias = nn.Parameter(torch.zeros(head_width)) if biased else None
        self.k_norm_weight = nn.Parameter(torch.ones(head_width)) if normed else None
        start = config.layer_scale
        self.scale1 = None if start is None else nn.Parameter(torch.full((width,), start))
        self.scale2 = None if start is None else nn.Parameter(torch.full((width,), start))
        centred = config.norm == "layer_norm"
        kind = NORM_CODES[config.qk_norm if normed else None]
        self.options = Options(
            config.heads, head_width**-0.5, config.mlp, q_kind=kind, k_kind=kind, norm_centred=centred,
            following_centred=centred, recompute=config.checkpointing == "mlp",
        )  # fmt: skip

    def forward(
        self, x_TE: Tensor, normed_TE: Tensor, following: Norm, cu_seqlens: Tensor, plan: PackPlan | None,
        keep_2S: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Take the stream and its norm; return them after both branches, normed for the block that follows."""
        mlp, norm = self.mlp, self.norm2
        keep1_S, keep2_S = (None, None) if keep_2S is None else keep_2S.unbind(0)
        linears: Any = (self.qkv, self.proj, mlp.fc1, mlp.fc2)
        layers = None if only_multiply(*linears) else Layers(self.qkv, self.proj, mlp)
        if layers is None:
            qkv, out, up, down = (layer.weight for layer in linears)
            qkv_bias, out_bias, up_bias, down_bias = (layer.bias for layer in linears)
        else:
            qkv = out = up = down = qkv_bias = out_bias = up_bias = down_bias = None
            if not torch.compiler.is_compiling():
                what = "layers of a Block are watched or replaced: each is called, which is slower"
                warnings.warn(what, stacklevel=2)
        parameters = Parameters(
            qkv, out, up, down, norm.weight, following.weight, qkv_bias=qkv_bias, out_bias=out_bias, up_bias=up_bias,
            down_bias=down_bias, q_weight=self.q_norm_weight, q_bias=self.q_norm_bias, k_weight=self.k_norm_weight,
            norm_bias=norm.bias, following_bias=following.bias, scale_1=self.scale1, scale_2=self.scale2,
        )  # fmt: skip
        return block(x_TE, normed_TE, parameters, self.options, cu_seqlens, plan, keep1_S, keep2_S, layers)


class MLP(nn.Module):
    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.activation, self.recompute = config.mlp, config.checkpointing == "mlp"
        self.fc1 = nn.Linear(config.width, config.mlp_width * (2 if config.mlp == "swiglu" else 1), config.bias)
        self.fc2 = nn.Linear(config.mlp_width, config.width, config.bias)

    def forward(self, x_TE: Tensor) -> Tensor:
        if not only_multiply(self.fc1, self.fc2):
            return self.fc2(activate(self.fc1(x_TE), self.activation))
        weights = self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias
        return feed_forward(x_TE, *weights, activation=self.activation, recompute=self.recompute)


class AttentionPool(nn.Module):
    """One learned query per head looks at its image's tokens; then an MLP (MAP: Zhai et al. 2021, arXiv 2106.04560)."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.k_norm = None if config.qk_norm == "none" else HeadNorm(config.qk_norm)
        self.query_HD = nn.Parameter(torch.empty(config.heads, config.width // config.heads))
        nn.init.trunc_normal_(self.query_HD, std=0.02)
        self.kv = nn.Linear(config.width, 2 * config.width, config.bias)
        self.proj = nn.Linear(config.width, config.width, config.bias)
        self.norm = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x_TE: Tensor, cu_seqlens: Tensor) -> Tensor:
        k_THD, v_THD = self.kv(x_TE).unflatten(1, (2, *self.query_HD.shape)).unbind(1)
        pooled_SHD = attention_pool(self.query_HD, k_THD, v_THD, cu_seqlens, k_norm=self.k_norm)
        x_SE, normed_SE = self.norm(self.proj(pooled_SHD.flatten(1)))
        return x_SE + self.mlp(normed_SE)


def split_images(x_TE: Tensor, packed: PackedImages) -> list[Tensor]:
    """One (rows, columns, E) tensor per image."""
    lengths, grids = (part[: len(packed)].tolist() for part in (packed.cu_seqlens.diff(), packed.grids))
    for place, length, (rows, columns) in zip(packed.order.tolist(), lengths, grids, strict=True):
        if length != rows * columns:
            wanted = f"whole for dense features, {rows} × {columns} patches"
            fail(f"images[{place}]", wanted, f"{length}: tokens were dropped")
    parts = x_TE[: sum(lengths)].split(lengths)
    return [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]
