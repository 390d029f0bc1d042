"""SigLIP 2 NaFlex, packed: the weights of its vision tower in a NaViT, without padding and without masks.

    model = from_transformers(their_model)          a Siglip2VisionModel, or a Siglip2Model's vision tower
    model = from_checkpoint(folder)                 config.json and safetensors; transformers need not be installed
    rows_SE = model(images)                         their pooler_output, one row per image
    rows_SE, features = model(images, dense=True)   and their last_hidden_state, (rows, columns, E) per image

Where it differs from our own NaViT: one learned table of side × side positions, resized to each image's grid, bilinear
with antialias. The pooling head's query, which they project from a probe, is a constant, and is stored projected.

T tokens, S images, N slots of each in a padded batch, P patch values, C channels, E model width, L positions in the
table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from navit_kernels._checks import check_option, check_shape, fail

from ..config import NaViTConfig
from ..data import ImageSet, SkipReport
from ..images import UnusableImage, read_rgb
from ..model import NaViT
from ..packing import PackedImages, pack
from .padding import unpad
from .resampling import resampled_positions

PREFIX = "vision_model."
VISION = (PREFIX, "embeddings.", "encoder.", "post_layernorm.", "head.")  # what names in a checkpoint start with
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
DEFAULTS = {  # of their vision configuration, for what a config.json leaves out
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "patch_size": 16, "num_patches": 256, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "vision_use_head": True,
}  # fmt: skip


class Siglip2(NaViT):
    """SigLIP 2's vision tower on packed images. `save_pretrained` and `from_pretrained` use our own format."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__(config)
        self.embed = TableEmbedding(config)  # type: ignore[assignment]

    def forward(
        self, images: PackedImages | Sequence[Any] | Mapping[str, Tensor], dense: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """One row per image, in the order given: (S, E).

        images: what a NaViT takes; or what their image processor gives, a mapping with pixel_values,
            pixel_attention_mask and spatial_shapes, which is unpadded here. dense: see `NaViT.forward`.
        """
        if isinstance(images, Mapping):
            config = self.config
            images = pack_inputs(**images, patch_size=config.patch_size).to(self.embed.proj.weight.device)
        return super().forward(images, dense)

    def resize_positions(self, table_length: int) -> None:
        raise NotImplementedError("the position table is stretched over every image already; its own size is fixed")


class TableEmbedding(nn.Module):
    """Patches to tokens, plus a table of positions that spans every image."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.side = config.table_length
        self.proj = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.table_LE = nn.Parameter(torch.empty(self.side**2, config.width))
        nn.init.trunc_normal_(self.table_LE, std=config.width**-0.5)

    def forward(self, patches_TP: Tensor, packed: PackedImages) -> Tensor:
        x_TE, table = self.proj(patches_TP), self.table_LE.unflatten(0, (self.side, self.side))
        tokens_T = torch.arange(len(x_TE), device=x_TE.device, dtype=packed.cu_seqlens.dtype)
        image_T = torch.searchsorted(packed.cu_seqlens, tokens_T, right=True) - 1
        return (x_TE + resampled_positions(table, packed.coords, packed.grids[image_T], "bilinear")).to(x_TE.dtype)


def pack_inputs(
    pixel_values: Tensor, spatial_shapes: Tensor, pixel_attention_mask: Tensor | None = None, *, patch_size: int
) -> PackedImages:
    """Pack what their image processor gives, on the device of pixel_values. Reads shapes and mask on the host.

    pixel_values: (S, N, P), the patches of each image and padding; a patch's values stand as (p1, p2, c).
    spatial_shapes: (S, 2) rows and columns. pixel_attention_mask: (S, N), 1 at the first rows · columns patches.
    Raises ValueError where these do not agree.
    """
    check_shape("pixel_values", pixel_values, (None, None, None), "(S, N, P)")
    images, slots, _ = pixel_values.shape
    check_shape("spatial_shapes", spatial_shapes, (images, 2), "(S, 2)")
    grids_S2 = spatial_shapes.cpu().int()
    lengths_S = grids_S2.prod(1)
    if images and lengths_S.max() > slots:
        fail("spatial_shapes", f"of at most the {slots} patches that pixel_values has", int(lengths_S.max()))
    valid_SN = torch.arange(slots) < lengths_S[:, None]
    if pixel_attention_mask is not None:
        check_shape("pixel_attention_mask", pixel_attention_mask, (images, slots), "(S, N)")
        wrong = (pixel_attention_mask.cpu().bool() != valid_SN).any(1).nonzero().flatten().tolist()
        if wrong:
            fail("pixel_attention_mask", "1 at the first rows · columns patches, 0 after", f"else in images {wrong}")
    found = unpad(valid_SN, valid_SN.device)
    patches_TP = pixel_values.flatten(0, 1).index_select(0, found.slots_T.to(pixel_values.device))
    patches_TP = patches_TP.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).flatten(1)
    place_T, columns_T = found.slots_T % slots, grids_S2[found.image_T, 1]
    packed = PackedImages(
        pixels=None,
        patches=patches_TP,
        cu_seqlens=found.cu_seqlens,
        coords=torch.stack([place_T // columns_T, place_T % columns_T], 1).int(),
        grids=grids_S2,
        order=torch.arange(images),
        patch_size=patch_size,
        plan=found.plan,
    )
    return packed.to(pixel_values.device)


# Weights


def from_transformers(model: nn.Module) -> Siglip2:
    """A packed model with copies of the weights of a Siglip2VisionModel, or of a Siglip2Model's vision tower.

    Their dtype, device and training mode stay. Raises ValueError, naming it, for an option that is not supported.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        fail("model", "a Siglip2VisionModel or a Siglip2Model of transformers", type(model).__name__)
    return _build(_navit_config(config.to_dict()), model.state_dict()).train(model.training)


def from_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Siglip2:
    """Read the vision tower of a SigLIP 2 NaFlex checkpoint, in evaluation mode and in the dtype that it has.

    folder: config.json, model.safetensors (or its shards and their index), and the image processor's configuration,
        whose mean and std `patchify` then uses.
    Raises FileNotFoundError for a missing file, ValueError, naming it, for what is not supported.
    """
    folder = Path(folder)
    rules = Preprocessing.read(folder)
    config = replace(_navit_config(_read_json(folder, "config.json")), mean=rules.mean, std=rules.std)
    if config.patch_size != rules.patch_size:
        fail("patch_size of the image processor", f"the model's, {config.patch_size}", rules.patch_size)
    return _build(config, _read_weights(folder)).to(device).eval()


def _navit_config(config: Mapping[str, Any]) -> NaViTConfig:
    check_option("model_type", config.get("model_type"), ("siglip2", "siglip2_vision_model"))
    given = config if config["model_type"] == "siglip2_vision_model" else config.get("vision_config") or {}
    vision = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    check_option("vision_use_head", vision["vision_use_head"], (True,))
    check_option("hidden_act", vision["hidden_act"], ACTIVATIONS)
    check_option("layer_norm_eps", vision["layer_norm_eps"], (1e-6,))
    check_option("attention_dropout", vision["attention_dropout"], (0,))
    side = math.isqrt(vision["num_patches"])
    if side**2 != vision["num_patches"]:
        fail("num_patches", "a square", vision["num_patches"])
    return NaViTConfig(
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        channels=vision["num_channels"],
        bias=True,
        qk_norm="none",
        mlp=ACTIVATIONS[vision["hidden_act"]],
        coordinates="fractional",
        table_length=side,
    )


def _build(config: NaViTConfig, theirs: Mapping[str, Tensor]) -> Siglip2:
    if any(name.startswith(PREFIX) for name in theirs):
        theirs = {name[len(PREFIX) :]: tensor for name, tensor in theirs.items() if name.startswith(PREFIX)}

    def take(name: str) -> Tensor:
        if name not in theirs:
            fail("the weights", f"a SigLIP 2 vision tower's with {name}", f"{len(theirs)} others")
        return theirs[name]

    def linear(name: str) -> dict[str, Tensor]:
        return {"weight": take(f"{name}.weight").clone(), "bias": take(f"{name}.bias").clone()}

    def mlp(name: str) -> dict[str, dict[str, Tensor]]:
        return {f"mlp.{layer}": linear(f"{name}.mlp.{layer}") for layer in ("fc1", "fc2")}

    def joined(name: str) -> dict[str, Tensor]:
        parts = [linear(f"{name}.{part}_proj") for part in ("q", "k", "v")]
        return {key: torch.cat([part[key] for part in parts]) for key in ("weight", "bias")}

    embed = linear("embeddings.patch_embedding")
    by_place = embed["weight"].unflatten(1, (config.patch_size, config.patch_size, config.channels))
    embed["weight"] = by_place.permute(0, 3, 1, 2).flatten(1).contiguous()
    modules = {"embed.proj": embed, "norm": linear("post_layernorm")}
    for index in range(config.depth):
        layer, block = f"encoder.layers.{index}", f"blocks.{index}"
        modules[f"{block}.norm1"] = linear(f"{layer}.layer_norm1")
        modules[f"{block}.norm2"] = linear(f"{layer}.layer_norm2")
        modules[f"{block}.qkv"] = joined(f"{layer}.self_attn")
        modules[f"{block}.proj"] = linear(f"{layer}.self_attn.out_proj")
        modules |= {f"{block}.{name}": part for name, part in mlp(layer).items()}
    weight, bias = take("head.attention.in_proj_weight"), take("head.attention.in_proj_bias")
    probe_E = take("head.probe").flatten()
    query_E = (weight[: config.width].double() @ probe_E.double() + bias[: config.width]).to(weight.dtype)
    modules["pool.kv"] = {"weight": weight[config.width :].clone(), "bias": bias[config.width :].clone()}
    modules["pool.proj"], modules["pool.norm"] = linear("head.attention.out_proj"), linear("head.layernorm")
    modules |= {f"pool.{name}": part for name, part in mlp("head").items()}
    state = {f"{module}.{name}": tensor for module, parts in modules.items() for name, tensor in parts.items()}
    state["embed.table_LE"] = take("embeddings.position_embedding.weight").clone()
    state["pool.query_HD"] = query_E.unflatten(0, (config.heads, -1))
    with torch.device("meta"):
        model = Siglip2(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit their configuration: {error}") from None
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the vision tower; others are not read."""
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    state: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}")
        with safe_open(folder / name, "pt") as file:
            keys = file.keys()
            state |= {key: file.get_tensor(key) for key in keys if key.startswith(VISION)}
    return state


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}: not a SigLIP 2 checkpoint")
    return json.loads((folder / name).read_text())


# Images


@dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint's image processor does with an image, in the way of its Pillow backend.

    An image is resized, up or down, to about the largest whole patches that keep its aspect ratio and number at most
    max_num_patches. mean, std: of pixels scaled to [0, 1]. resample: Pillow's number of the filter.
    """

    patch_size: int
    max_num_patches: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @classmethod
    def read(cls, folder: str | Path) -> Preprocessing:
        """From preprocessor_config.json, or the image processor in processor_config.json.

        Raises FileNotFoundError, and ValueError, naming it, for a step that is not supported.
        """
        folder, name = Path(folder), "preprocessor_config.json"
        if not (folder / name).is_file() and (folder / "processor_config.json").is_file():
            rules = _read_json(folder, "processor_config.json").get("image_processor", {})
        else:
            rules = _read_json(folder, name)
        kind = rules.get("image_processor_type", "none")
        if not kind.startswith("Siglip2ImageProcessor"):
            fail("image_processor_type", "Siglip2ImageProcessor", kind)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            check_option(step, rules.get(step, True), (True,))
        if not math.isclose(rules.get("rescale_factor", 1 / 255), 1 / 255):
            fail("rescale_factor", "1 / 255", rules["rescale_factor"])
        return cls(
            patch_size=rules.get("patch_size", 16),
            max_num_patches=rules.get("max_num_patches", 256),
            mean=tuple(rules.get("image_mean", (0.5, 0.5, 0.5))),
            std=tuple(rules.get("image_std", (0.5, 0.5, 0.5))),
            resample=rules.get("resample", Image.Resampling.BILINEAR),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of an image. Scales are halved until they differ by 1e-5, as theirs are, sides rounded up."""

        def at(scale: float) -> tuple[int, int]:
            rows, columns = (max(1, math.ceil(side * scale / self.patch_size)) for side in (height, width))
            return rows, columns

        fits, exceeds = 1e-6, 100.0
        while exceeds - fits >= 1e-5:
            middle = (fits + exceeds) / 2
            if math.prod(at(middle)) <= self.max_num_patches:
                fits = middle
            else:
                exceeds = middle
        return at(fits)

    def load(self, path: str | Path) -> Tensor:
        """Decode an image file → uint8 (3, H, W). Raises UnusableImage."""
        image = read_rgb(path, lambda height, width: (height, width))
        rows, columns = self.grid(image.height, image.width)
        size = (columns * self.patch_size, rows * self.patch_size)
        pixels_HWC = np.asarray(image.resize(size, Image.Resampling(self.resample)))
        return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))

    def packs(
        self, images: ImageSet, token_budget: int = 16_384, report: SkipReport | None = None
    ) -> Iterator[tuple[PackedImages, Tensor]]:
        """(pack, labels) of image files in the set's order; a pack's `order` holds places in the set."""
        waiting: list[tuple[int, Tensor]] = []

        def packed() -> tuple[PackedImages, Tensor]:
            places, pixels = zip(*waiting, strict=True)
            (whole,) = pack(pixels, None, patch_size=self.patch_size)
            return replace(whole, order=torch.tensor(places)), torch.tensor([images.labels[place] for place in places])

        room = token_budget
        for place, path in enumerate(images.paths):
            try:
                pixels = self.load(path)
            except UnusableImage as reason:
                if report is not None:
                    report.reasons[path] = str(reason)
                continue
            tokens = pixels[0].numel() // self.patch_size**2
            if waiting and tokens > room:
                yield packed()
                waiting, room = [], token_budget
            waiting.append((place, pixels))
            room -= tokens
        if waiting:
            yield packed()
