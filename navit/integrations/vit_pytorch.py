"""vit-pytorch's NaViTs on packed tokens: `na_vit.NaViT` and `na_vit_nested_tensor.NaViT` (vit-pytorch 1.23 to 1.26).

    model = accelerate(model)       # in place of the model; shares its parameters
    model = load(state_dict)        # from a checkpoint, without vit-pytorch

What the two have of their own, beside the ops of navit_kernels:

    na_vit.NaViT                    q and k scaled to length √D, times gamma per head; scores not scaled further; norms
                                    with weight gamma and a buffer beta as bias; pool + query
    na_vit_nested_tensor.NaViT      LayerNorm of q and k, shared by the heads, or none; scores over √D; norms without
                                    bias but for the patch embedding

In both, the pooling attention norms its query and not its keys' input. The nested one as shipped cuts the graph behind
its embedding, so that no gradient reaches it, nor the pool's query; here all train. The 3D variant is refused.

T tokens, S images, E model width, H heads, D head width, P patch values.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from navit_kernels import (
    HeadNorm,
    PackPlan,
    add_norm,
    add_positions,
    attention_pool,
    patchify,
    varlen_attention_qkvpacked,
)
from navit_kernels._autocast import autocast_dtype
from navit_kernels._checks import fail
from navit_kernels.block import Options, Parameters, block
from navit_kernels.head_norm import NORM_CODES
from navit_kernels.patches import KeptPatches

from ..packing import PackedImages, pack

MINIMUM = (1, 23)
MAX_PATCH_SIZE, MAX_CHANNELS = 32, 4  # patchify's
UNSUPPORTED_3D = "na_vit_nested_tensor_3d.NaViT is not supported: it has frames and register tokens"


def accelerate(model: nn.Module) -> PackedNaViT:
    """The same model on packed tokens.

    model: a `vit_pytorch.na_vit.NaViT` or `vit_pytorch.na_vit_nested_tensor.NaViT`. Its parameters and buffers are
        shared, not copied, under the same names: optimizers made before, state dicts and checkpoints stay valid, and
        training either trains both. `to_latent` and `mlp_head` are taken as they are, replaced ones too. Hooks on
        other modules are not. Dropout rates, token dropout, training mode and frozen parameters are taken over.

    Returns a PackedNaViT; see its `forward` for what it takes. Raises TypeError for another class, a subclass included;
    NotImplementedError for the 3D variant, patches of more than 32 pixels a side and more than 4 channels; ImportError
    for a vit-pytorch older than 1.23; RuntimeError, by name, for parameters that vit-pytorch's class does not have.
    """
    _check_version()
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if name == "vit_pytorch.na_vit_nested_tensor_3d.NaViT":
        raise NotImplementedError(UNSUPPORTED_3D)
    if name not in ("vit_pytorch.na_vit.NaViT", "vit_pytorch.na_vit_nested_tensor.NaViT"):
        raise TypeError(f"model must be a NaViT of vit_pytorch.na_vit or vit_pytorch.na_vit_nested_tensor, got {name}")
    theirs: Any = model
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.device("meta"):
        packed = PackedNaViT(tensors, theirs.channels)
    packed.to_latent, packed.mlp_head = theirs.to_latent, theirs.mlp_head
    for key, parameter in packed.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(key not in tensors or tensors[key].requires_grad)
    packed.load_state_dict(tensors, assign=True)
    for key, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            cast("nn.Dropout", packed.get_submodule(key)).p = module.p
    if packed.nested:
        packed.token_dropout_prob = theirs.token_dropout_prob
        rates = [attention.dropout for attention, _ in theirs.transformer.layers]
    else:
        packed.token_dropout_prob = theirs.calc_token_dropout
        rates = [attention.dropout_p for attention, _ in theirs.transformer.layers]
    packed.attention_dropout = max(rates, default=0.0)
    return packed.train(model.training)


def load(state: Mapping[str, Tensor], channels: int = 3) -> PackedNaViT:
    """A model with the weights of a state dict of theirs, copied; vit-pytorch need not be installed.

    All sizes are read from it, but the channels of the images. Rates of dropout, which it does not hold, are 0: see
    PackedNaViT. Raises ValueError or RuntimeError for another model's state dict, NotImplementedError for the 3D
    variant's and as in `accelerate`.
    """
    with torch.device("meta"):
        packed = PackedNaViT(state, channels)
    packed.load_state_dict({key: tensor.detach().clone() for key, tensor in state.items()}, assign=True)
    return packed


def _check_version() -> None:
    try:
        version = importlib.metadata.version("vit-pytorch")
    except importlib.metadata.PackageNotFoundError:  # the classes came by another way
        return
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        raise ImportError(
            f"navit.integrations needs vit-pytorch >= {'.'.join(map(str, MINIMUM))}, found {version}; install it with: "
            "pip install 'navit-kernels[vit-pytorch]'"
        )


class PackedNaViT(nn.Module):
    """vit-pytorch's parameters, by its names, on packed tokens. Made by `accelerate` and `load`.

    token_dropout_prob: share of an image's patches dropped in training, or a function of its (height, width) in pixels,
        or None. At least one patch stays, drawn by torch's generator of the CPU.
    attention_dropout: vit-pytorch's `dropout` drops attention weights too, which our kernels do not: training at a rate
        other than 0 raises NotImplementedError. Setting it to 0.0 trains without; the other dropouts stay.
    """

    def __init__(self, state: Mapping[str, Tensor], channels: int) -> None:
        """Modules that fit a state dict; their values are not set."""
        super().__init__()
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if "pos_embed_frame" in shapes:
            raise NotImplementedError(UNSUPPORTED_3D)
        self.nested = "attn_pool.to_queries.weight" in shapes
        if not self.nested and "attn_pool.to_kv.weight" not in shapes:
            fail(
                "state", "of vit_pytorch's na_vit.NaViT or na_vit_nested_tensor.NaViT", f"keys {sorted(shapes)[:5]}, …"
            )
        width, values = shapes["to_patch_embedding.1.weight"]
        self.channels, self.patch_size = channels, math.isqrt(values // channels)
        if channels * self.patch_size**2 != values:
            fail("channels", f"such that patches of {values} values are square", channels)
        if channels > MAX_CHANNELS or self.patch_size > MAX_PATCH_SIZE:
            limits = f"at most {MAX_CHANNELS} channels and patches of {MAX_PATCH_SIZE} pixels a side are supported"
            raise NotImplementedError(f"{limits}, got {channels} and {self.patch_size}")
        make_norm: Callable[..., Norm | nn.LayerNorm] = nn.LayerNorm if self.nested else Norm
        unbiased = {"bias": False} if self.nested else {}
        self.to_patch_embedding = nn.Sequential(make_norm(values), nn.Linear(values, width), make_norm(width))
        self.pos_embed_height = nn.Parameter(torch.empty(shapes["pos_embed_height"]))
        self.pos_embed_width = nn.Parameter(torch.empty(shapes["pos_embed_width"]))
        self.dropout = nn.Dropout(0.0)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList()
        while (key := f"transformer.layers.{len(self.transformer.layers)}") + ".1.1.weight" in shapes:
            hidden = shapes[f"{key}.1.1.weight"][0]
            mlp = [make_norm(width, **unbiased), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.0),
                   nn.Linear(hidden, width), nn.Dropout(0.0)]  # fmt: skip
            attention = self._attention(shapes, f"{key}.0")
            self.transformer.layers.append(nn.ModuleList([attention, nn.Sequential(*mlp)]))
        self.transformer.norm = make_norm(width, **unbiased)
        self.attn_pool_queries = nn.Parameter(torch.empty(width))
        self.attn_pool = self._attention(shapes, "attn_pool")
        self.to_latent: nn.Module = nn.Identity()
        self.mlp_head: nn.Module = nn.Identity()
        if "mlp_head.1.weight" in shapes:
            classes = shapes["mlp_head.1.weight"][0]
            self.mlp_head = nn.Sequential(make_norm(width, **unbiased), nn.Linear(width, classes, bias=False))
        self.token_dropout_prob: float | Callable[[int, int], float] | None = None
        self.attention_dropout = 0.0

    def _attention(self, shapes: Mapping[str, tuple[int, ...]], key: str) -> Attention:
        """The attention of one block or of the pool. The pool has norms even where blocks have none."""
        if self.nested:
            inner, width = shapes[f"{key}.to_queries.weight"]
            (head_width,) = shapes["attn_pool.query_norm.weight"]
            return NestedAttention(width, inner // head_width, head_width, f"{key}.query_norm.weight" in shapes)
        heads, _, head_width = shapes[f"{key}.q_norm.gamma"]
        return DenseAttention(shapes[f"{key}.to_q.weight"][1], heads, head_width)

    def forward(
        self,
        images: PackedImages | Sequence[Tensor] | Sequence[Sequence[Tensor]],
        group_images: bool = False,
        group_max_seq_len: int = 2048,
    ) -> Tensor:
        """(S, classes) logits, one row per image in the order given.

        images: (C, H, W) float tensors of one dtype, or lists of them, or what `pack` made of either, on the model's
            device. Unlike theirs, this model takes uint8 images too, as image / 255.
        group_images, group_max_seq_len: nothing to decide here, for there is no padding: all images are one pack, and
            no image is too long.

        Under torch.compile a pack runs as one graph for all batches, and a list of images is packed before it.
        """
        if self.training and self.attention_dropout > 0:
            rate = self.attention_dropout
            raise NotImplementedError(
                f"attention_dropout must be 0 in training, got {rate}: set model.attention_dropout = 0.0 to go without"
            )
        packed = images
        if not isinstance(packed, PackedImages):
            packed = self.pack(packed).to(self.pos_embed_height.device, non_blocking=True)
        x_TE = self.dropout(self._embed(packed))
        layers: list[Any] = list(cast("nn.ModuleList", self.transformer.layers))
        norms = [attention.norm for attention, _ in layers] + [self.transformer.norm]
        x_TE, normed_TE = _add_norm(x_TE, None, norms[0], self._dtype())
        for (attention, mlp), following in zip(layers, norms[1:], strict=True):
            x_TE, normed_TE = self._block(attention, mlp, following, x_TE, normed_TE, packed)
        pooled_SE = self.attn_pool.pool(self.attn_pool_queries, normed_TE, packed.cu_seqlens)
        if not self.nested:
            pooled_SE = pooled_SE + self.attn_pool_queries
        return self.mlp_head(self.to_latent(pooled_SE))

    def _block(
        self, attention: Attention, mlp: Any, following: Any, x_TE: Tensor, normed_TE: Tensor, packed: PackedImages
    ) -> tuple[Tensor, Tensor]:
        """A layer: from the stream and its norm to the stream and the following norm's."""
        norm, up, activation, inner_dropout, down, dropout = mlp
        drops = self.training and (attention.out_dropout() > 0 or inner_dropout.p > 0 or dropout.p > 0)
        if drops:
            x_TE, normed_TE = _add_norm(x_TE, attention(normed_TE, packed.cu_seqlens, packed.plan), norm)
            return _add_norm(x_TE, dropout(down(inner_dropout(activation(up(normed_TE))))), following)
        (qkv, qkv_2, qkv_3), (q_weight, k_weight) = attention.weights(), attention.head_weights()
        parameters = Parameters(
            qkv, attention.out_weight(), up.weight, down.weight, norm.weight, following.weight, qkv_2, qkv_3,
            up_bias=up.bias, down_bias=down.bias, q_weight=q_weight, k_weight=k_weight, norm_bias=norm.bias,
            following_bias=following.bias,
        )  # fmt: skip
        kind, eps = NORM_CODES[attention.norm_kind], attention.norm_eps
        options = Options(
            attention.heads, attention.softmax_scale, "gelu", kind, eps, kind, eps, True, norm.eps, True, following.eps
        )
        return block(x_TE, normed_TE, parameters, options, packed.cu_seqlens, packed.plan)

    def _dtype(self) -> torch.dtype:
        """Of the matrix products. The residual stream has the weights' dtype, under autocast too, as theirs has."""
        weight = self.pos_embed_height
        return autocast_dtype(weight.device) or weight.dtype

    def _embed(self, packed: PackedImages) -> Tensor:
        if packed.patch_size != self.patch_size or packed.prefix_tokens or packed.pixels is None:
            expected = f"made by this model's `pack`, of patches of {self.patch_size} pixels"
            fail("images", expected, f"a pack of patches of {packed.patch_size}")
        patch_norm, proj, norm = self.to_patch_embedding
        plain = [0.0] * self.channels, [1.0] * self.channels
        keep = KeptPatches(packed.cu_seqlens, packed.coords)
        patches_TP = patchify(
            packed.pixels, self.patch_size, *plain, keep=keep, norm=_parts(patch_norm), dtype=self._dtype()
        )
        tables = self.pos_embed_height, self.pos_embed_width
        return add_positions(proj(patches_TP), packed.coords, *tables, norm=_parts(norm), dtype=tables[0].dtype)

    def pack(self, images: Sequence[Tensor] | Sequence[Sequence[Tensor]]) -> PackedImages:
        """Lay images, or lists of them, end to end, on their device; in training, drop tokens.

        Raises ValueError, naming the image, for one that the model cannot take.
        """
        if torch.compiler.is_compiling():  # sizes, and which tokens stay, are decided outside of graphs
            return torch.compiler.disable(self.pack)(images)
        flat = [image for part in images for image in ([part] if isinstance(part, Tensor) else part)]
        if not flat:
            fail("images", "at least one image", "none")
        rows, columns = self.pos_embed_height.shape[0], self.pos_embed_width.shape[0]
        limit_height, limit_width = rows * self.patch_size, columns * self.patch_size
        shapes = [image.shape for image in flat]
        if any(len(s) != 3 or s[0] != self.channels or s[1] > limit_height or s[2] > limit_width for s in shapes):
            self._refuse(shapes, limit_height, limit_width)
        drop, seed = None, 0
        if self.training and self.token_dropout_prob is not None:
            drop, seed = self._dropped, int(torch.randint(2**62, ()))
        (packed,) = pack(flat, None, patch_size=self.patch_size, token_drop=drop, seed=seed)
        return packed

    def _refuse(self, shapes: Sequence[torch.Size], limit_height: int, limit_width: int) -> None:
        """The first image that the model cannot take."""
        for index, shape in enumerate(shapes):
            if len(shape) != 3 or shape[0] != self.channels:
                fail(f"images[{index}]", f"a tensor (C, H, W) of {self.channels} channels", tuple(shape))
            if shape[1] > limit_height or shape[2] > limit_width:
                limits = f"at most {limit_height} × {limit_width} pixels, as far as positions go"
                fail(f"images[{index}]", limits, f"{shape[1]} × {shape[2]}")

    def _dropped(self, rows: int, columns: int) -> float:
        """Share of an image's patches to drop, such that as many stay as in theirs."""
        rate, count = self.token_dropout_prob, rows * columns
        if callable(rate):
            rate = rate(rows * self.patch_size, columns * self.patch_size)
        assert rate is not None
        kept = int((1.0 - rate) * torch.tensor(count)) if self.nested else int(count * (1 - rate))  # float32, float64
        return 1 - max(1, kept) / count


def _parts(norm: Any) -> tuple[Tensor, Tensor | None, float]:
    return norm.weight, norm.bias, norm.eps


def _add_norm(
    x_TE: Tensor, branch_TE: Tensor | None, norm: Any, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    return add_norm(x_TE, branch_TE, norm.weight, norm.bias, eps=norm.eps, out_dtype=dtype)


class Norm(nn.Module):
    """na_vit's LayerNorm."""

    beta: Tensor
    eps = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    @property
    def weight(self) -> Tensor:
        return self.gamma

    @property
    def bias(self) -> Tensor:
        return self.beta

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.eps)


class Attention(nn.Module):
    """Attention of either model; subclasses name the parameters. `forward` takes normed tokens."""

    norm: nn.Module
    to_out: Any
    heads: int
    softmax_scale: float
    norm_kind: str | None  # of q and k
    norm_eps: float

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows for q, then for k, then for v, in two or three parts; all heads of each."""
        raise NotImplementedError

    def head_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the norms of q and k, (D,) or (H, 1, D)."""
        raise NotImplementedError

    def out_weight(self) -> Tensor:
        raise NotImplementedError

    def out_dropout(self) -> float:
        return 0.0

    def head_norms(self) -> tuple[HeadNorm | None, HeadNorm | None]:
        q_weight, k_weight = self.head_weights()
        if self.norm_kind is None or q_weight is None or k_weight is None:
            return None, None
        q_norm, k_norm = (
            HeadNorm(self.norm_kind, weight if weight.dim() == 1 else weight.squeeze(1), eps=self.norm_eps)
            for weight in (q_weight, k_weight)
        )
        return q_norm, k_norm

    def forward(self, normed_TE: Tensor, cu_seqlens: Tensor, plan: PackPlan | None) -> Tensor:
        """(T, E): each image's tokens attend to one another."""
        qkv_IE = torch.cat([part for part in self.weights() if part is not None])
        qkv_T3HD = linear(normed_TE, qkv_IE).unflatten(1, (3, self.heads, -1))
        q_norm, k_norm = self.head_norms()
        out_THD = varlen_attention_qkvpacked(
            qkv_T3HD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, softmax_scale=self.softmax_scale, plan=plan
        )
        return self.to_out(out_THD.flatten(1))

    def pool(self, query_E: Tensor, x_TE: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(S, E): one query looks at each image's tokens."""
        to_q, *to_kv = (part for part in self.weights() if part is not None)
        query_HD = linear(self.norm(query_E), to_q).unflatten(0, (self.heads, -1))
        kv_IE = to_kv[0] if len(to_kv) == 1 else torch.cat(to_kv)
        k_THD, v_THD = linear(x_TE, kv_IE).unflatten(1, (2, self.heads, -1)).unbind(1)
        q_norm, k_norm = self.head_norms()
        pooled_SHD = attention_pool(
            query_HD, k_THD, v_THD, cu_seqlens, q_norm=q_norm, k_norm=k_norm, softmax_scale=self.softmax_scale
        )
        return self.to_out(pooled_SHD.flatten(1))


class DenseAttention(Attention):
    """na_vit's."""

    softmax_scale = 1.0
    norm_kind, norm_eps = "l2", 1e-12

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm = Norm(width)
        self.q_norm, self.k_norm = HeadGamma(heads, head_width), HeadGamma(heads, head_width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width, bias=False), nn.Dropout(0.0))

    def weights(self) -> tuple[Tensor, Tensor, None]:
        return self.to_q.weight, self.to_kv.weight, None

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return self.q_norm.gamma, self.k_norm.gamma

    def out_weight(self) -> Tensor:
        return self.to_out[0].weight

    def out_dropout(self) -> float:
        return self.to_out[1].p


class HeadGamma(nn.Module):
    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, head_width))


class NestedAttention(Attention):
    """na_vit_nested_tensor's."""

    def __init__(self, width: int, heads: int, head_width: int, normed: bool) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.softmax_scale = head_width**-0.5
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_queries = nn.Linear(width, inner, bias=False)
        self.to_keys = nn.Linear(width, inner, bias=False)
        self.to_values = nn.Linear(width, inner, bias=False)
        self.query_norm = nn.LayerNorm(head_width, bias=False) if normed else None
        self.key_norm = nn.LayerNorm(head_width, bias=False) if normed else None
        self.norm_kind, self.norm_eps = "layer_norm" if normed else None, 1e-5
        self.to_out = nn.Linear(inner, width, bias=False)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_queries.weight, self.to_keys.weight, self.to_values.weight

    def head_weights(self) -> tuple[Tensor | None, Tensor | None]:
        if self.query_norm is None or self.key_norm is None:
            return None, None
        return self.query_norm.weight, self.key_norm.weight

    def out_weight(self) -> Tensor:
        return self.to_out.weight
